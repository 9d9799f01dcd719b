"""`python bench/gpu.py OUT`: everything a machine with a GPU can say, in under nine minutes.

Builds the library, runs the gpu-marked tests and the sanitizer on small shapes, then the benches
with their peers. Needs torch and triton alone (pytest where there is one). Logs, reports and a
table of the steps are written to OUT; the exit code is that of the worst step.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_TESTS = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]


class Step(NamedTuple):
    """A command, the program it needs, and the seconds it may take."""

    name: str
    command: list[str]
    needs: str
    limit: int


def steps(out: Path) -> list[Step]:
    """Return the steps, correctness first."""
    python, sanitizer = sys.executable, "compute-sanitizer"
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    check = [sanitizer, "--error-exitcode=1", python, *_TESTS, "-k", "softmax_pass"]
    races = [python, "bench/run.py", "all", "--plain", "--device", "cuda", "--output", str(out)]
    return [
        Step("build", build, "nvcc", 120),
        Step("tests", [python, *_TESTS], python, 120),
        Step("sanitizer", check, sanitizer, 90),
        Step("benches", races, python, 200),
    ]


def run(step: Step, out: Path) -> tuple[str, float, str]:
    """Run a step with its output in a log; return its outcome, seconds and last line."""
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
                timeout=step.limit,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    lines = log.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return ("ok" if code == 0 else f"exit {code}"), time.monotonic() - start, last.strip()[:100]


def main() -> int:
    """Run all steps and print the table; return 0 if none failed."""
    if len(sys.argv) != 2:
        print("usage: python bench/gpu.py OUT", file=sys.stderr)
        return 2
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    rows = [("step", "outcome", "seconds", "last line")]
    for step in steps(out):
        outcome, seconds, last = run(step, out)
        rows.append((step.name, outcome, f"{seconds:.0f}", last))
    table = "\n".join(f"{a:<10} {b:<9} {c:>7}  {d}" for a, b, c, d in rows)
    (out / "table.txt").write_text(table + "\n")
    print(table)
    return int(any(outcome.startswith("exit") for _, outcome, _, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
