"""What a person sees of a run: one bar for all of it, or lines where there is no terminal."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from tqdm import tqdm
from typing_extensions import Self

from .tables import Table

_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone{postfix}, {remaining} left"


@dataclass(frozen=True)
class Progress:
    """Where a run is, after a step."""

    stage: str
    step: int
    steps: int
    work: int
    loss: float
    tokens_per_second: float

    def __str__(self) -> str:
        return f"loss {self.loss:.3f}, {self.tokens_per_second:,.0f} tokens/s"


class Console:
    """Shows progress in units of work, so that a stage with a bigger model counts for more.

    Args:
        total: the work of the whole run, in FLOPs.
        every: steps between two lines where the output is not a terminal.
    """

    def __init__(self, *, total: int, every: int, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self._every = every
        self._lines = not self._file.isatty()
        # without a terminal the bar only keeps the time; it writes nothing
        sink = _Nowhere() if self._lines else self._file
        self._bar = tqdm(
            total=total, file=sink, bar_format=_BAR, dynamic_ncols=not self._lines, leave=True
        )

    def start(self, work: int) -> None:
        """Count earlier work as done, but not as time spent here."""
        self._bar.initial = self._bar.n = work

    def doing(self, what: str) -> None:
        self._bar.set_description_str(what)

    def step(self, progress: Progress) -> None:
        self._bar.set_description_str(f"{progress.stage} {progress.step}/{progress.steps}", False)
        self._bar.set_postfix_str(str(progress), False)
        self._bar.update(progress.work - self._bar.n)
        if self._lines and (progress.step % self._every == 0 or progress.step == progress.steps):
            print(self._line(progress), file=self._file, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def _line(self, progress: Progress) -> str:
        state = self._bar.format_dict
        share = state["n"] / state["total"]
        rate = (state["n"] - state["initial"]) / max(state["elapsed"], 1e-9)
        left = tqdm.format_interval((state["total"] - state["n"]) / max(rate, 1e-9))
        where = f"{progress.stage} {progress.step}/{progress.steps}"
        return f"{where}  {progress}  {share:.0%}, {left} left"


def say(line: str) -> None:
    """Print a line about the run, above a bar if there is one."""
    tqdm.write(line, file=sys.stderr)


def show(tables: Sequence[Table]) -> None:
    """Print the result of a run."""
    print("\n" + "\n\n".join(table.text() for table in tables))


class _Nowhere:
    def write(self, text: str) -> None:
        """Drop the text."""

    def flush(self) -> None:
        """Nothing is held back."""
