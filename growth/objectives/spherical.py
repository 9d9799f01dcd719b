"""Losses whose cost does not grow with tokens times vocabulary: the spherical family."""

from dataclasses import dataclass

import torch
from torch import Tensor

from apical.kernels.spherical_loss import (
    SphericalStatistics,
    log_spherical_softmax,
    log_taylor_softmax,
    spherical_loss,
    standardized_loss,
)

from ._bias import with_bias
from ._checks import check


@dataclass(frozen=True, kw_only=True)
class _Spherical:
    """What the family shares: a subclass says what one token costs."""

    def of(self, statistics: SphericalStatistics) -> Tensor:
        """Return the loss of each token, (T,), from mean, variance and own place of its logits."""
        raise NotImplementedError

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        """Return the mean loss, a scalar; 0 where no token has a label.

        Shapes: hidden (T, H); weight (V, H); target (T,) int64; linear_bias (V,).

        Args:
            hidden: the last hidden states.
            weight: the head.
            target: the next token, or -100.
            linear_bias: of the head.
            softcap: must be None: a cap bends the logits, and their moments are not known then.
            logit_scale: of the head's logits.
            num_items: what the mean divides by, the tokens with a label by default.

        Raises:
            ValueError: softcap is given.
        """
        if softcap is not None:
            raise ValueError(
                f"softcap is {softcap}, but {type(self).__name__} takes linear logits only; "
                "expected a head without soft-capping"
            )
        return spherical_loss(
            *with_bias(hidden, weight, linear_bias),
            target,
            self.of,
            logit_scale=logit_scale,
            num_items=num_items,
            impl="reference" if hidden.dtype == torch.float64 else "fused",
        )


@dataclass(frozen=True, kw_only=True)
class SphericalZLoss(_Spherical):
    """The Z-loss: how many standard deviations the right word's logit lies above the mean.

        loss = softplus(sharpness * (location - z)) / sharpness,   z = (o_y - mean(o)) / std(o)

    No relation of the z-loss of `linear_cross_entropy`, which holds lse near 0. It ranks words but
    gives no probabilities, so it has no perplexity; z is at most sqrt(V - 1).

    Args:
        sharpness: a; the larger, the more words count that are nearly at the location.
        location: b, the z above which a word is as good as found. Both defaults are ours, to be
            tuned to the vocabulary.

    Raises:
        ValueError: an argument is out of its range.

    Source: de Brébisson and Vincent 2016, arXiv 1604.08859.
    """

    sharpness: float = 0.1
    location: float = 10.0

    def __post_init__(self) -> None:
        check(0 < self.sharpness < float("inf"), self, "sharpness", "a positive number")
        check(abs(self.location) < float("inf"), self, "location", "a finite number")

    def of(self, statistics: SphericalStatistics) -> Tensor:
        return standardized_loss(statistics, sharpness=self.sharpness, location=self.location)


@dataclass(frozen=True, kw_only=True)
class LogTaylorSoftmax(_Spherical):
    """Negative log-likelihood with 1 + o + o^2 / 2 where softmax has exp(o).

    A word is the more likely the farther its logit is from -1, on either side.

    Source: de Brébisson and Vincent 2015, arXiv 1511.05042.
    """

    def of(self, statistics: SphericalStatistics) -> Tensor:
        return log_taylor_softmax(statistics)


@dataclass(frozen=True, kw_only=True)
class LogSphericalSoftmax(_Spherical):
    """Negative log-likelihood with o^2 + offset where softmax has exp(o).

    A word is the more likely the farther its logit is from 0, on either side.

    Args:
        offset: keeps the logarithm finite at 0; to be tuned.

    Raises:
        ValueError: an argument is out of its range.

    Source: Vincent et al. 2015, arXiv 1412.7091; de Brébisson and Vincent 2015, arXiv 1511.05042.
    """

    offset: float

    def __post_init__(self) -> None:
        check(0 < self.offset < float("inf"), self, "offset", "a positive number")

    def of(self, statistics: SphericalStatistics) -> Tensor:
        return log_spherical_softmax(statistics, offset=self.offset)
