"""Supports by rows on NVIDIA GPUs: the weight is made once for each pass, then multiplied with."""

import torch
from torch import Tensor

from .._common import native
from ._index import positions
from ._scaled import scaled

# the gradient of b comes from that of the whole weight
KEEPS_HIDDEN = False


def takes(input: Tensor, layout: list[int]) -> bool:  # noqa: A002
    """Return whether these are rows on a GPU, and the library was built with its kernel."""
    known = input.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return (
        known and layout[0] == 0 and input.is_cuda and native.loaded()
        and hasattr(torch.ops.apical, "sparse_rebuild")
    )  # fmt: skip


def forward(
    input: Tensor,  # noqa: A002
    a: Tensor,
    b: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: list[Tensor],
    layout: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the product (T, n), and nothing to keep."""
    weight = rebuilt(a, b, values, index, scale)
    out = torch.nn.functional.linear(input, weight, bias)
    return out, input.new_empty(0)


def backward(
    grad_output: Tensor,
    input: Tensor,  # noqa: A002
    a: Tensor,
    b: Tensor,
    values: Tensor,
    hidden: Tensor,
    index: list[Tensor],
    layout: list[int],
    scale: float,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of input, a, b, values and bias, of shape (0,) where not wanted."""
    out = [input.new_empty(0) for _ in wanted]
    if wanted[0]:
        out[0] = grad_output @ rebuilt(a, b, values, index, scale)
    if any(wanted[1:4]):
        grad_weight = grad_output.t() @ input
        if wanted[1]:
            out[1] = scaled(b.t(), grad_weight, scale)
        if wanted[2]:
            out[2] = scaled(grad_weight, a.t(), scale)
        if wanted[3]:
            out[3] = grad_weight.flatten()[positions(index, layout, len(values))]
    if wanted[4]:
        out[4] = grad_output.sum(0)
    return tuple(out)


def rebuilt(a: Tensor, b: Tensor, values: Tensor, index: list[Tensor], scale: float) -> Tensor:
    """Return scale b a + S, of shape (n, m), rounded once."""
    tensors = (x.contiguous() for x in (a, b, values))
    return torch.ops.apical.sparse_rebuild(*tensors, index[0], index[1], scale)
