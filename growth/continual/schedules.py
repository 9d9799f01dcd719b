"""Learning rates as closed-form functions of the step, and one adapter to torch.

A schedule holds no state: the position in a run is the step, so resuming is setting a number.
`value(0)` is the learning rate of the first update; after its last step a schedule stays flat.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewarmCosine:
    """Linear re-warming to `peak`, then a cosine to `min_ratio * peak` at `steps`.

    Args:
        peak: largest learning rate; for continual training, the peak of pre-training.
        steps: length of this phase alone, warm-up included.
        warmup_steps: length of the re-warming; 1 % of `steps` is usual.
        min_ratio: final learning rate over `peak`; 0 is allowed.

    Raises:
        ValueError: an argument is out of its range.

    Source: Gupta et al. 2023 (arXiv 2308.04014); Ibrahim et al. 2024 (arXiv 2403.08763).
    """

    peak: float
    steps: int
    warmup_steps: int
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check(0 < self.peak < math.inf, self, "peak", "a positive number")
        _check(self.steps >= 1, self, "steps", "at least 1")
        _check(0 <= self.warmup_steps <= self.steps, self, "warmup_steps", "from 0 to steps")
        _check(0 <= self.min_ratio <= 1, self, "min_ratio", "from 0 to 1")

    def value(self, step: int) -> float:
        """Return the learning rate of update `step`, counted from 0."""
        _check_step(step)
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        length = self.steps - self.warmup_steps
        passed = min(step - self.warmup_steps, length)
        return _cosine(self.peak, self.peak * self.min_ratio, passed, length)


@dataclass(frozen=True)
class Infinite:
    """Warm-up, cool-down to a constant that lasts as long as wanted, then annealing.

    Annealing is exponential, from `constant_ratio * peak` to `min_ratio * peak`; with
    `min_ratio=0` it is linear, because an exponential never reaches zero. Without a
    cool-down the warm-up ends at the constant, so that the schedule has no jump.

    Args:
        peak: largest learning rate.
        warmup_steps: length of the warm-up; 0 when going on from the constant.
        cooldown_steps: length of the way from `peak` to the constant.
        constant_ratio: constant learning rate over `peak`.
        min_ratio: final learning rate over `peak`.
        shape: of the cool-down, "cosine" or "isqrt" (inverse square root).
        timescale: steepness of "isqrt".
        anneal_start: first step of the annealing; None while the constant is open-ended.
        anneal_steps: length of the annealing.

    Raises:
        ValueError: an argument is out of its range.

    Source: Ibrahim et al. 2024 (arXiv 2403.08763), section 7; Singh et al. 2025 (arXiv 2503.02844).
    """

    peak: float
    warmup_steps: int
    cooldown_steps: int
    constant_ratio: float = 0.55
    min_ratio: float = 0.1
    shape: Literal["cosine", "isqrt"] = "cosine"
    timescale: float = 10.0
    anneal_start: int | None = None
    anneal_steps: int | None = None

    def __post_init__(self) -> None:
        _check(0 < self.peak < math.inf, self, "peak", "a positive number")
        _check(self.warmup_steps >= 0, self, "warmup_steps", "at least 0")
        _check(self.cooldown_steps >= 0, self, "cooldown_steps", "at least 0")
        _check(0 < self.constant_ratio <= 1, self, "constant_ratio", "above 0, at most 1")
        _check(0 <= self.min_ratio <= self.constant_ratio, self, "min_ratio", "0 to constant_ratio")
        _check(self.shape in ("cosine", "isqrt"), self, "shape", "'cosine' or 'isqrt'")
        _check(0 < self.timescale < math.inf, self, "timescale", "a positive number")
        self._check_annealing()

    def _check_annealing(self) -> None:
        if self.anneal_start is None or self.anneal_steps is None:
            both = self.anneal_start is None and self.anneal_steps is None
            _check(both, self, "anneal_start", "given together with anneal_steps, or neither")
            return
        earliest = self.warmup_steps + self.cooldown_steps
        expected = f"at least warmup_steps + cooldown_steps = {earliest}"
        _check(self.anneal_start >= earliest, self, "anneal_start", expected)
        _check(self.anneal_steps >= 1, self, "anneal_steps", "at least 1")

    def anneal(self, *, start: int, steps: int) -> "Infinite":
        """Return this schedule with its annealing begun at `start`, however late."""
        return replace(self, anneal_start=start, anneal_steps=steps)

    def value(self, step: int) -> float:
        """Return the learning rate of update `step`, counted from 0."""
        _check_step(step)
        if self.anneal_start is not None and step > self.anneal_start:
            return self._annealed(step - self.anneal_start)
        if step >= self.warmup_steps + self.cooldown_steps:
            return self.peak * self.constant_ratio
        if step >= self.warmup_steps:
            return self._cooled(step - self.warmup_steps)
        top = self.peak if self.cooldown_steps else self.peak * self.constant_ratio
        return top * step / self.warmup_steps

    def _cooled(self, passed: int) -> float:
        constant = self.peak * self.constant_ratio
        if self.shape == "cosine":
            return _cosine(self.peak, constant, passed, self.cooldown_steps)
        fall = _inverse_sqrt(passed / self.cooldown_steps, self.timescale)
        return self.peak + (constant - self.peak) * fall / _inverse_sqrt(1.0, self.timescale)

    def _annealed(self, passed: int) -> float:
        assert self.anneal_steps is not None
        constant, final = self.peak * self.constant_ratio, self.peak * self.min_ratio
        if passed >= self.anneal_steps:
            return final
        share = passed / self.anneal_steps
        if final == 0:
            return constant * (1 - share)
        return constant * math.exp(math.log(final / constant) * share)


Schedule = RewarmCosine | Infinite


class ScheduleLR(LRScheduler):
    """A schedule as a torch learning-rate scheduler, for a plain loop or a Trainer.

    Every parameter group keeps its ratio to `schedule.peak`: build the optimizer with
    `lr=schedule.peak`; groups with an `lr` of their own peak there.

    Args:
        optimizer: its groups' base learning rates are read here.
        schedule: the closed form to follow.

    Raises:
        ValueError: no parameter group has `schedule.peak` as its base learning rate.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule) -> None:
        self.schedule = schedule
        bases = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        if not any(math.isclose(base, schedule.peak) for base in bases):
            raise ValueError(
                f"optimizer has base learning rates {bases}, none of them schedule.peak="
                f"{schedule.peak}: build it with lr=schedule.peak"
            )
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return each group's learning rate at the current step."""
        value = self.schedule.value(self.last_epoch)
        return [value * (base / self.schedule.peak) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the step, the groups' base learning rates and every parameter of the schedule."""
        return {
            "last_epoch": self.last_epoch,
            "base_lrs": [float(base) for base in self.base_lrs],
            "schedule": {"kind": type(self.schedule).__name__, **asdict(self.schedule)},
        }

    def load_state_dict(self, state_dict: dict[str, Any], *, strict: bool = True) -> None:
        """Go to the saved step and set the groups' learning rates there.

        Args:
            state_dict: from `state_dict()`.
            strict: refuse a state of another schedule; otherwise log the differences, keep
                the present schedule and take only the step (to begin annealing late, say).

        Raises:
            ValueError: the saved schedule or base learning rates differ, and `strict` is set.
        """
        differences = _differences(_flat(state_dict), _flat(self.state_dict()))
        if differences and strict:
            raise ValueError(
                f"schedule differs from the saved one: {'; '.join(differences)}; "
                "restore it, or pass strict=False"
            )
        if differences:
            _log.warning("keeping the present schedule: %s", "; ".join(differences))
        step = state_dict["last_epoch"]
        # as at construction: torch's order-of-calls check is for users, not for a resume
        self.last_epoch, self._step_count = step - 1, 0
        self.step()
        self._step_count = step + 1


def _cosine(start: float, end: float, passed: int, length: int) -> float:
    if length == 0:
        return start
    # weights that are exactly 1 and 0 at the ends, so that no boundary is off by a rounding
    weight = (1 + math.cos(math.pi * passed / length)) / 2
    return start * weight + end * (1 - weight)


def _inverse_sqrt(share: float, timescale: float) -> float:
    return 1 / math.sqrt(1 + timescale * share) - 1


def _check(holds: bool, schedule: Schedule, name: str, expected: str) -> None:
    if not holds:
        value = getattr(schedule, name)
        raise ValueError(f"{type(schedule).__name__}: {name} is {value!r}, expected {expected}")


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step is {step}, expected a count from 0")


def _flat(state: dict[str, Any]) -> dict[str, Any]:
    return {**state["schedule"], "base_lrs": state["base_lrs"]}


def _differences(saved: dict[str, Any], present: dict[str, Any]) -> Sequence[str]:
    names = [*saved, *(name for name in present if name not in saved)]
    absent = "absent"
    return [
        f"{name} was {saved.get(name, absent)}, is {present.get(name, absent)}"
        for name in names
        if saved.get(name, absent) != present.get(name, absent)
    ]
