"""The definition, in plain PyTorch: any device, float32 and above, differentiable twice."""

import torch
from torch import Tensor
from torch.nn import functional as F


def forward(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor,
    valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return nll and lse (T,), 0 where not valid."""
    dtype = torch.promote_types(
        torch.promote_types(input.dtype, linear_weight.dtype), torch.float32
    )
    # valid rows alone: 0 * NaN of an ignored row would reach the gradient of linear_weight
    rows = valid.nonzero().squeeze(1)  # (N,)
    logits = F.linear(input[rows].to(dtype), linear_weight.to(dtype))  # (N, V)
    nll = F.cross_entropy(logits, target[rows], reduction="none")
    zeros = logits.new_zeros(valid.shape)
    return zeros.index_put((rows,), nll), zeros.index_put((rows,), logits.logsumexp(1))
