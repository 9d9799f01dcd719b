"""Methods of merging: each says how much of every model is in the merged one.

Every method is linear in the weights, so it is one coefficient per model, the same for all tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Method(Protocol):
    """Says how much of each of `count` models is in the merged one."""

    def coefficients(self, count: int) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class Average:
    """The mean of the models, sum of w_i * model_i / sum of w_i; all w_i are 1 unless given.

    Args:
        weights: one per model, none negative, not all 0.

    Raises:
        ValueError: weights are no such numbers.

    Source: Model soups, arXiv 2203.05482, the uniform soup.
    """

    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        _check_numbers("weights", self.weights)
        if min(self.weights) < 0 or not sum(self.weights):
            raise ValueError(
                f"weights are {list(self.weights)}; expected none negative and not all 0: "
                "use Linear for other sums"
            )

    def coefficients(self, count: int) -> tuple[float, ...]:
        """Return the share of each model; they sum to 1."""
        weights = [1.0] * count if self.weights is None else self.weights
        check_count("weights", len(weights), count)
        return _shares(weights)


@dataclass(frozen=True)
class EMA:
    """The exponential moving average of checkpoints in the order in which they were trained.

    e_0 = model_0 and e_i = decay * e_(i-1) + (1 - decay) * model_i; the result is the last one.

    Args:
        decay: how much of the average is kept at each checkpoint, in [0, 1).

    Raises:
        ValueError: decay is no such number.

    Source: Polyak and Juditsky 1992; for language models Early Weight Averaging, arXiv 2306.03241.
    """

    decay: float

    def __post_init__(self) -> None:
        _check_numbers("decay", [self.decay])
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; expected a number in [0, 1), such as 0.5")

    def coefficients(self, count: int) -> tuple[float, ...]:
        """Return the share of each checkpoint; they sum to 1."""
        later = [(1 - self.decay) * self.decay ** (count - 1 - i) for i in range(1, count)]
        return (self.decay ** (count - 1), *later)


@dataclass(frozen=True)
class Linear:
    """The sum of w_i * model_i, whatever the weights sum to.

    Args:
        weights: one per model.

    Raises:
        ValueError: weights are not numbers.

    Source: WiSE-FT, arXiv 2109.01903, interpolates two models; here weights are free.
    """

    weights: Sequence[float]

    def __post_init__(self) -> None:
        _check_numbers("weights", self.weights)

    def coefficients(self, count: int) -> tuple[float, ...]:
        """Return the weights."""
        check_count("weights", len(self.weights), count)
        return tuple(float(weight) for weight in self.weights)


@dataclass(frozen=True)
class TaskVectors:
    """The base and scaled task vectors: base + sum of scale_i * (model_i - base).

    The first model is the base. A negative scale forgets a task.

    Args:
        scale: of every task vector; the paper chooses it on held-out data, near 0.3 for several
            tasks and 1 for one.
        scales: or one for each model after the base.

    Raises:
        ValueError: both or none of them is given, or not numbers.

    Source: Editing models with task arithmetic, arXiv 2212.04089.
    """

    scale: float | None = None
    scales: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if (self.scale is None) == (self.scales is None):
            raise ValueError(
                f"scale is {self.scale} and scales is {self.scales}; expected one of them, "
                "such as scale=0.3"
            )
        if self.scale is not None:
            _check_numbers("scale", [self.scale])
        if self.scales is not None:
            _check_numbers("scales", self.scales)

    def coefficients(self, count: int) -> tuple[float, ...]:
        """Return what is left of the base, and the scales."""
        scales = [self.scale or 0.0] * (count - 1) if self.scales is None else self.scales
        check_count("scales", len(scales), count - 1, "model after the base")
        return (1 - math.fsum(scales), *(float(scale) for scale in scales))


@dataclass(frozen=True)
class Posterior:
    """Experts weighted by how likely each is to have written a text: p_i ~ prior_i * exp(score_i).

    Args:
        scores: one per expert: log-likelihood of a held-out text, in nats. That of a long text
            singles out one expert; the paper takes a sequence at a time and averages.
        prior: one per expert, none negative, not all 0; all equal unless given.

    Raises:
        ValueError: they are no such numbers.

    Source: Branch-Train-Merge, arXiv 2208.03306, the parametric average by domain posterior.
    """

    scores: Sequence[float]
    prior: Sequence[float] | None = None

    def __post_init__(self) -> None:
        _check_numbers("scores", self.scores)
        if self.prior is not None:
            check_count("prior", len(self.prior), len(self.scores), "score")
            Average(self.prior)

    def coefficients(self, count: int) -> tuple[float, ...]:
        """Return the posterior of each expert; they sum to 1."""
        check_count("scores", len(self.scores), count)
        prior = [1.0] * count if self.prior is None else self.prior
        best = max(s for s, p in zip(self.scores, prior, strict=True) if p)
        # min: an expert that the prior rules out may have a higher score than any other
        weights = [p * math.exp(min(s - best, 0)) for s, p in zip(self.scores, prior, strict=True)]
        return _shares(weights)


def check_count(name: str, found: int, count: int, of: str = "model") -> None:
    """Check that there is one number for each model.

    Raises:
        ValueError: there are more or fewer.
    """
    if found != count:
        raise ValueError(f"{name} has {found} numbers; expected {count}, one for each {of}")


def _shares(weights: Sequence[float]) -> tuple[float, ...]:
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def _check_numbers(name: str, values: Sequence[float]) -> None:
    for value in values:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not math.isfinite(value):
            raise ValueError(f"{name} has {value!r}; expected finite numbers")
    if not values:
        raise ValueError(f"{name} is empty; expected one number for each model")
