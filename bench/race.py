"""Ours against its peers: in turn, in one process, so that what disturbs one disturbs all."""

import contextlib
import gc
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]

OURS = "ours"
# what a peer raises when it cannot do a case here
_REFUSALS = (RuntimeError, ValueError, TypeError, ImportError, OSError, MemoryError)


@dataclass(frozen=True)
class Peer:
    """Something to race against, or the reason why it is not there."""

    call: Call | None = None
    reason: str = ""
    # a bound, such as the matrix products alone: it computes less, so nothing is compared
    limit: bool = False
    # its first call builds something, and is neither timed nor weighed
    compiled: bool = False
    # its time as a rough multiple of ours: whether one call is worth starting at all
    expected: float = 1.0
    # brings its outputs into the layout of the others; not timed
    unpack: Callable[[Outputs], Outputs] | None = None


@dataclass(frozen=True)
class Lineup:
    """Everything that one race needs."""

    ours: Call
    peers: Mapping[str, Call | Peer]
    what: str = ""
    truth: Call | None = None  # by default, what ours returns
    tolerance: float = 1e-4  # of an output's Frobenius norm
    flops: float | None = None  # useful ones, whatever a provider really does
    bytes: float | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Case:
    """A race by its name, not built yet: inputs take memory only while they are used."""

    name: str
    build: Callable[[], Lineup]


@dataclass(frozen=True)
class Settings:
    """When to stop."""

    rounds: int = 15
    min_rounds: int = 3
    budget_s: float = 6.0  # of rounds, per case
    slow_s: float = 3.0  # whoever takes longer is called once
    limit_s: float = 15.0  # whoever is expected to take longer is not called


@dataclass
class Entrant:
    """A provider and what was seen of it."""

    name: str
    status: str = "ok"  # ok | wrong | not run
    reason: str = ""
    limit: bool = False
    error: float | None = None
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)  # its time / ours, pair by pair
    peak_bytes: int | None = None


@dataclass
class Result:
    """One race; the first entrant is ours."""

    name: str
    lineup: Lineup
    entrants: list[Entrant]

    @property
    def ours(self) -> Entrant:
        return self.entrants[0]


class Meter(Protocol):
    """A device's clock and scales."""

    def seconds(self, call: Call) -> float:
        """Return how long one call takes."""
        ...

    def weigh(self, call: Call) -> tuple[Outputs, float, int | None]:
        """Return the outputs of one call, its time, and the growth of memory at its peak."""
        ...


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def race(name: str, lineup: Lineup, *, meter: Meter, settings: Settings) -> Result:
    """Return what one race showed: outputs first, then times, in rounds of rotating order.

    Raises:
        RuntimeError: ours cannot run; whoever else cannot is listed with the reason.
    """
    peers = {OURS: Peer(lineup.ours)}
    for key, value in lineup.peers.items():
        peers[key] = value if isinstance(value, Peer) else Peer(value)
    with _quiet():
        entrants = _qualify(peers, lineup, meter, settings)
        _run_rounds(peers, entrants, meter, settings)
    return Result(name, lineup, list(entrants.values()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # what peers warn of is not ours to fix, and why they refuse is in the report
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _qualify(
    peers: dict[str, Peer], lineup: Lineup, meter: Meter, settings: Settings
) -> dict[str, Entrant]:
    """Call everyone once: outputs against the truth, memory, and a first time."""
    truth = lineup.truth() if lineup.truth else None
    entrants: dict[str, Entrant] = {}
    for name, peer in peers.items():
        entrant = entrants[name] = Entrant(name, reason=peer.reason, limit=peer.limit)
        if name != OURS and not entrant.reason:
            entrant.reason = _too_slow(peer, entrants[OURS].seconds[0], settings)
        if entrant.reason:
            entrant.status = "not run"
            continue
        outputs = _first_call(peer, entrant, meter)
        if name == OURS and outputs is None:
            raise RuntimeError(f"ours cannot run: {entrant.reason}")
        if outputs is None or peer.limit:
            continue
        truth = outputs if truth is None else truth
        entrant.error = disagreement(peer.unpack(outputs) if peer.unpack else outputs, truth)
        # not "greater": nan is wrong too
        entrant.status = "ok" if entrant.error <= lineup.tolerance else "wrong"
    return entrants


def _too_slow(peer: Peer, ours_s: float, settings: Settings) -> str:
    if peer.expected * ours_s <= settings.limit_s:
        return ""
    return (
        f"expected to take about {peer.expected:.0f} times as long as ours, "
        f"over the limit of {settings.limit_s:g} s a call (--limit)"
    )


def _first_call(peer: Peer, entrant: Entrant, meter: Meter) -> Outputs | None:
    assert peer.call is not None
    try:
        if peer.compiled:
            peer.call()
        outputs, seconds, entrant.peak_bytes = meter.weigh(peer.call)
    except _REFUSALS as error:
        entrant.status, entrant.reason = "not run", one_line(error)
        return None
    entrant.seconds = [seconds]
    return outputs


def one_line(error: BaseException) -> str:
    """Return the type and the first sentence of an error's message."""
    message = (str(error).strip() or "no message").splitlines()[0].split(". ")[0]
    return f"{type(error).__name__}: {message[:160].rstrip('.')}"


def disagreement(outputs: Outputs, truth: Outputs) -> float:
    """Return the largest relative error, in the Frobenius norm, over all outputs."""
    if [o.shape for o in outputs] != [t.shape for t in truth]:
        return math.inf
    worst = 0.0
    for output, expected in zip(outputs, truth, strict=True):
        wide = expected.double()
        difference = float((output.to(wide) - wide).norm() / wide.norm().clamp(min=1e-30))
        worst = difference if not difference <= worst else worst
        if math.isnan(worst):
            return worst
    return worst


def _run_rounds(
    peers: dict[str, Peer], entrants: dict[str, Entrant], meter: Meter, settings: Settings
) -> None:
    """Time the quick ones in turn; the slow ones keep the time of their first call."""
    running = [e for e in entrants.values() if e.status != "not run"]
    racing = [e for e in running if e.name == OURS or e.seconds[0] <= settings.slow_s]
    for entrant in racing:
        entrant.seconds = []
    gc.collect()
    gc.disable()
    try:
        _time_in_turn(peers, racing, meter, settings)
    finally:
        gc.enable()
    ours = entrants[OURS].seconds
    for entrant in running:
        # a slow one has no pair: its one time is held against the median of ours
        against = ours if entrant in racing else [statistics.median(ours)]
        pairs = zip(entrant.seconds, against, strict=True)
        entrant.ratios = [theirs / mine for theirs, mine in pairs]


def _time_in_turn(
    peers: dict[str, Peer], racing: list[Entrant], meter: Meter, settings: Settings
) -> None:
    spent = 0.0
    for i_round in range(settings.rounds):
        if spent > settings.budget_s and i_round >= settings.min_rounds:
            return
        first = i_round % len(racing)
        for entrant in racing[first:] + racing[:first]:
            call = peers[entrant.name].call
            assert call is not None
            entrant.seconds.append(meter.seconds(call))
            spent += entrant.seconds[-1]
