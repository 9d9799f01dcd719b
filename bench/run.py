"""`python bench/run.py OP|all`: race ours against its peers and write what was seen."""

import argparse
import functools
import importlib
import importlib.util
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import report
from session import HERE, Session, default_device, operations, settings

RESULTS = HERE / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one bench or all of them; return 0 if ours ran everywhere and was right."""
    options = _parser().parse_args(arguments)
    names = operations() if options.op == "all" else [options.op]
    if options.output is None:
        # a quick run is no measurement: it must not land among them
        folder = tempfile.mkdtemp(prefix="apical-bench-") if options.quick else RESULTS
        options.output = Path(folder)
    plain = options.plain or importlib.util.find_spec("pytest_benchmark") is None
    return run_plain(names, options) if plain else _run_pytest(names, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="apical bench", description=__doc__)
    parser.add_argument("op", choices=[*operations(), "all"])
    parser.add_argument("--plain", action="store_true", help="without pytest-benchmark")
    add_options(parser.add_argument)
    return parser


def add_options(add: Callable[..., object]) -> None:
    """Add the options that this command and pytest share."""
    add("--quick", action="store_true", help="small shapes: a smoke test")
    add("--output", type=Path, help="folder of the reports")
    add("--threads", type=int, default=1, help="torch's threads on the CPU")
    add("--budget", type=float, default=6.0, help="seconds of rounds per case")
    add("--limit", type=float, default=15.0, help="skip who would take longer, seconds per call")
    add("--match", default="", help="only the cases whose name has this in it")
    add("--device", choices=["cpu", "cuda"], default=default_device())


def session_of(options: argparse.Namespace) -> Session:
    """Return the session that the options describe."""
    when = settings(quick=options.quick, budget_s=options.budget, limit_s=options.limit)
    return Session(options.device, options.threads, options.quick, when)


def run_plain(names: Sequence[str], options: argparse.Namespace) -> int:
    """Run the benches with torch alone."""
    logging.basicConfig(format="%(message)s")
    session = session_of(options)
    right = True
    for op in names:
        cases = functools.partial(importlib.import_module(op).cases, device=options.device)
        session.warm_up(cases(quick=True))
        for case in [c for c in cases(quick=options.quick) if options.match in c.name]:
            result = session.run(op, case.name, case.build())
            right &= result.ours.status == "ok"
            print(f"\n{op}: {case.name}", *report.lines(result), sep="\n  ", flush=True)
    print("", *session.write(options.output), sep="\n")
    return 0 if right else 1


def _run_pytest(names: Sequence[str], options: argparse.Namespace) -> int:
    """Run the benches under pytest-benchmark, which also keeps its own files to compare with."""
    import pytest

    flags = ["--quick"] if options.quick else ["--benchmark-autosave"]
    for name in ("output", "threads", "budget", "limit", "match", "device"):
        flags += [f"--{name}", str(getattr(options, name))]
    paths = [str(HERE / f"{name}.py") for name in names]
    return int(pytest.main([*paths, "--benchmark-only", "--capture=no", *flags]))


if __name__ == "__main__":
    sys.exit(main())
