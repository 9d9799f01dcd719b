"""One run of some benches: the same for pytest and for the plain path."""

from dataclasses import dataclass, field
from pathlib import Path

import machine
import measure
import report
import torch
from race import Case, Lineup, Result, Settings, race

HERE = Path(__file__).parent


def operations() -> list[str]:
    """Return the names of the benches: the files here that have cases."""
    return sorted(p.stem for p in HERE.glob("*.py") if "\ndef cases(" in p.read_text())


def default_device() -> str:
    """Return "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Session:
    """Settings, the device's ceilings, and the results so far."""

    device: str
    threads: int
    quick: bool
    settings: Settings
    results: dict[str, list[Result]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.set_num_threads(self.threads)
        self.facts = machine.facts(self.device, self.threads) | {"quick": self.quick}
        self.peaks = measure.peaks(self.device, quick=self.quick)
        self._meter = measure.meter_for(self.device)

    def warm_up(self, cases: list[Case]) -> None:
        """Call everyone on small cases: what libraries load once is nobody's memory."""
        for case in [] if self.quick else cases:
            race(case.name, case.build(), meter=self._meter, settings=Settings(rounds=1))

    def run(self, op: str, name: str, lineup: Lineup) -> Result:
        """Race one case and keep the result."""
        torch.manual_seed(0)
        result = race(name, lineup, meter=self._meter, settings=self.settings)
        self.results.setdefault(op, []).append(result)
        return result

    def write(self, folder: Path) -> list[Path]:
        """Write a report of every op that ran; return the files."""
        facts = self.facts | {"load_end": machine.load()}
        written = []
        for op, results in self.results.items():
            data = report.summary(op, results, facts, self.peaks)
            written += report.write(data, folder / f"{op}-{machine.slug(facts)}-{facts['date']}")
        return written


def settings(*, quick: bool, budget_s: float, limit_s: float) -> Settings:
    """Return when to stop; a quick run stops after three rounds."""
    if quick:
        return Settings(rounds=3, budget_s=1.0, limit_s=limit_s)
    return Settings(budget_s=budget_s, limit_s=limit_s)
