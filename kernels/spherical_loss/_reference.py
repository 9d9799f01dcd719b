"""The definition, in plain PyTorch: any device, all logits, float64, differentiable twice."""

import torch
from torch import Tensor

from ._statistics import SphericalStatistics

# a variance below this part of the products of squared norms is the rounding of equal logits
_ROUNDING = 1e-26


def forward(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor,
    valid: Tensor,
) -> SphericalStatistics:
    """Return the statistics of each token."""
    # valid rows alone: 0 * NaN of an ignored row would reach the gradient of linear_weight
    rows = valid.nonzero().squeeze(1)  # (N,)
    x, W = input[rows].double(), linear_weight.double()
    logits = x @ W.t()  # (N, V)
    mean = logits.mean(1)
    variance = (logits - mean[:, None]).square().mean(1)
    rounding = _ROUNDING * x.detach().square().sum(1) * W.detach().square().sum() / len(W)
    variance = torch.where(variance > rounding, variance, 0.0)
    margin = logits.gather(1, target[rows, None]).squeeze(1) - mean
    zeros = logits.new_zeros(valid.shape)
    spread = (zeros.index_put((rows,), part) for part in (mean, variance, margin))
    return SphericalStatistics(*spread, vocabulary=len(W))
