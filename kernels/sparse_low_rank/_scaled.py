"""The product that every implementation makes of low-rank factors."""

import torch
from torch import Tensor


def scaled(left: Tensor, right: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Return ``scale * left @ right + bias``, the factor and the bias without a pass of their own.

    Shapes: left (X, Y), right (Y, Z), bias (Z,), result (X, Z).
    """
    if bias is not None:
        return torch.addmm(bias, left, right, alpha=scale)
    return torch.addmm(left.new_zeros(()), left, right, beta=0, alpha=scale)
