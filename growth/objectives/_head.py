"""What every objective does with a head: the fused loss, and plain logits some rows at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from apical.kernels.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy

# logits in memory at once: 64 MB of float32
_LOGITS = 2**24


def head_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, **options: Any
) -> LinearCrossEntropyOutput:
    """Return `linear_cross_entropy`, in the precision of float64 inputs where they are."""
    # the fused implementation computes in float32
    impl = "reference" if hidden.dtype == torch.float64 else "fused"
    return linear_cross_entropy(hidden, weight, target, impl=impl, **options)


def logit_chunks(
    hidden: Tensor,
    weight: Tensor,
    *,
    linear_bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows and their logits (C, V), at least float32, never more than 64 MB of them.

    Shapes: hidden (T, H); weight (V, H); linear_bias (V,).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weight = weight.to(dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    size = max(1, _LOGITS // weight.shape[0])
    for start in range(0, hidden.shape[0], size):
        rows = slice(start, start + size)
        logits = linear(hidden[rows].to(dtype), weight, bias) * logit_scale
        yield rows, softcap * torch.tanh(logits / softcap) if softcap else logits
