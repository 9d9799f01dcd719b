"""The product by definition: the weight is made, then multiplied with; differentiable twice."""

import torch.nn.functional as F
from torch import Tensor

from .support import Support


def weight(a: Tensor, b: Tensor, values: Tensor, support: Support, scale: float) -> Tensor:
    """Return the weight (n, m)."""
    low_rank = scale * (b @ a)
    stored = support.flat(values.device)
    return low_rank.flatten().index_add(0, stored, values).view_as(low_rank)


def forward(
    input: Tensor,  # noqa: A002
    a: Tensor,
    b: Tensor,
    values: Tensor,
    bias: Tensor | None,
    support: Support,
    scale: float,
) -> Tensor:
    """Return the product (..., n) of input (..., m)."""
    return F.linear(input, weight(a, b, values, support, scale), bias)
