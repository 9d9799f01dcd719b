"""How float32 gradients become half precision on a CPU: scaled on the way, without a copy."""

import torch
from torch import Tensor

from . import native

# elements at a time, so that what lies between the two steps stays in the caches
_PART = 1 << 18

torch.library.define(
    "apical::rounded_gradient", "(Tensor grad, Tensor factor, ScalarType dtype) -> Tensor"
)


@torch.library.impl("apical::rounded_gradient", "CPU")
def _(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16 and native.loaded() and torch.ops.apical.amx_supported():
        return torch.ops.apical.amx_rounded(grad, factor)
    out, part = torch.empty_like(grad, dtype=dtype), grad.new_empty(min(_PART, grad.numel()))
    for some, to in zip(grad.view(-1).split(_PART), out.view(-1).split(_PART), strict=True):
        to.copy_(torch.mul(some, factor, out=part[: len(some)]))
    return out


@torch.library.register_fake("apical::rounded_gradient")
def _(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(grad, dtype=dtype)


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return factor x grad, contiguous float32, in this precision; where it can, in grad itself."""
    if dtype == torch.float32 or grad.device.type != "cpu":
        return grad.mul_(factor).to(dtype)
    return torch.ops.apical.rounded_gradient(grad, factor, dtype)
