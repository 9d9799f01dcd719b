"""The family: plain functions of a token's three statistics."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ._statistics import SphericalStatistics


def standardized_loss(
    statistics: SphericalStatistics, *, sharpness: float, location: float
) -> Tensor:
    """Return the Z-loss (T,): softplus(sharpness (location - z)) / sharpness.

    z is the target's logit less the mean of all logits, over their standard deviation; where that
    is 0, so is z, without gradient. Adding to all logits, or scaling them by a positive number,
    changes nothing.

    Source: de Brébisson and Vincent 2016, arXiv:1604.08859.
    """
    _, variance, margin, _ = statistics
    spread = variance > 0
    # the branch not taken must not divide by zero either: its gradient would be NaN
    z = torch.where(spread, margin * torch.where(spread, variance, 1.0).rsqrt(), 0.0)
    # softplus switches to the identity above 20, which is exact to 2e-9 only
    return softplus(sharpness * (location - z), threshold=40) / sharpness


def log_taylor_softmax(statistics: SphericalStatistics) -> Tensor:
    """Return (T,) -log f(o_y) / sum_j f(o_j) with f(o) = 1 + o + o^2 / 2.

    Source: de Brébisson and Vincent 2015, arXiv:1511.05042.
    """
    o = statistics.logit
    total = 1 + statistics.mean + statistics.mean_square / 2
    return math.log(statistics.vocabulary) + total.log() - (1 + o + o.square() / 2).log()


def log_spherical_softmax(statistics: SphericalStatistics, *, offset: float) -> Tensor:
    """Return (T,) -log f(o_y) / sum_j f(o_j) with f(o) = o^2 + offset.

    Source: Vincent et al. 2015, arXiv:1412.7091; de Brébisson and Vincent 2015, arXiv:1511.05042.
    """
    total = statistics.mean_square + offset
    return math.log(statistics.vocabulary) + (
        total.log() - (statistics.logit.square() + offset).log()
    )
