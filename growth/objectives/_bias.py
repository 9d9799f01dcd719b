"""A head's bias for losses that know none."""

import torch
from torch import Tensor


def with_bias(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return hidden states and a head whose product has the bias: a column of ones more.

    Shapes: hidden (T, H); weight (V, H); bias (V,); results (T, H + 1) and (V, H + 1).
    """
    if bias is None:
        return hidden, weight
    ones = hidden.new_ones(*hidden.shape[:-1], 1)
    return torch.cat([hidden, ones], -1), torch.cat([weight, bias[:, None]], 1)
