"""`python bench/gpu.py --out DIR`: what a machine with a GPU can say, in under nine minutes.

Builds the library, runs the gpu-marked tests and the sanitizer on small shapes, then the benches
with their peers. Needs torch and triton alone (pytest where there is one). Logs, reports and a
table of the steps are written to DIR; the exit code is 1 if a step failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_TESTS = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
# of all steps together
_LIMIT_S = 530


class Step(NamedTuple):
    """A command, the program it needs, and the seconds it may take."""

    name: str
    command: list[str]
    needs: str
    limit: int


def steps(out: Path, *, match: str) -> list[Step]:
    """Return the steps, correctness first."""
    python, sanitizer = sys.executable, "compute-sanitizer"
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    check = [sanitizer, "--error-exitcode=1", python, *_TESTS, "-k", "sanitizer"]
    race = [python, "bench/run.py"]
    where = ["--plain", "--device", "cuda", "--output", str(out), "--match", match]
    return [
        Step("build", build, "nvcc", 120),
        Step("tests", [python, *_TESTS], python, 240),
        Step("sanitizer", check, sanitizer, 100),
        Step("attention", [*race, "varlen_attention", *where, "--budget", "0.3"], python, 300),
        Step("loss", [*race, "linear_cross_entropy", *where, "--budget", "2"], python, 120),
        Step("sparse", [*race, "sparse_low_rank", *where, "--budget", "1"], python, 100),
        Step("monarch", [*race, "monarch", *where, "--budget", "0.5"], python, 60),
        Step("training", [*race, "packed_training", *where, "--budget", "2"], python, 120),
    ]


def run(step: Step, out: Path, left_s: float) -> tuple[str, float, str]:
    """Run a step with its output in a log; return its outcome, seconds and last line."""
    if left_s < 10:
        return "skipped", 0.0, "no time left"
    if shutil.which(step.needs) is None:
        return "skipped", 0.0, f"{step.needs} is not installed"
    # a checkout need not be installed
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
    log, start = out / f"{step.name}.log", time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                step.command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=min(step.limit, left_s),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    lines = log.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return ("ok" if code == 0 else f"exit {code}"), time.monotonic() - start, last.strip()[:100]


def main() -> int:
    """Run all steps and print the table; return 0 if none failed."""
    parser = argparse.ArgumentParser(prog="bench/gpu.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of logs and reports")
    parser.add_argument("--steps", nargs="*", help="only these steps")
    parser.add_argument("--match", default="", help="only bench cases with this in their name")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    rows = [("step", "outcome", "seconds", "last line")]
    start = time.monotonic()
    for step in steps(out, match=options.match):
        if options.steps and step.name not in options.steps:
            continue
        outcome, seconds, last = run(step, out, _LIMIT_S - (time.monotonic() - start))
        rows.append((step.name, outcome, f"{seconds:.0f}", last))
    table = "\n".join(f"{a:<10} {b:<9} {c:>7}  {d}" for a, b, c, d in rows)
    (out / "table.txt").write_text(table + "\n")
    print(table)
    return int(any(outcome.startswith("exit") for _, outcome, _, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
