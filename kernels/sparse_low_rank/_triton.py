"""Blocks on NVIDIA GPUs: which calls the Triton kernels take, and both passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._common.triton_device import runs_triton
from ._scaled import scaled

if TYPE_CHECKING:
    from ._triton_launch import Blocks


def takes(input: Tensor, layout: list[int]) -> bool:  # noqa: A002
    """Return whether the kernels can compute this layer: blocks of whole sixteens of rows.

    Args:
        layout: kind (1: blocks), out_features, in_features, rows and columns of a block.
    """
    known = input.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and layout[0] == 1 and layout[3] % 16 == 0 and runs_triton(input.device)


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
    """Return the result (T, n) and hidden (T, R), input's product with a.

    Raises:
        NotImplementedError: rows of a block are no multiple of 16.
    """
    from . import _triton_launch as launches

    blocks, input = _blocks(index, layout), _rows(input)  # noqa: A001
    hidden = input @ a.t()
    if not len(input):
        return input.new_empty(0, layout[1]), hidden
    bias = None if bias is None else bias.contiguous()
    named = input, hidden, _rows(b), values.contiguous(), bias, blocks, scale
    return launches.forward(*named), hidden


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
    """Return the gradients of input, a, b, values and bias, of shape (0,) where not wanted.

    Shapes: hidden (T, R), or (0,) to compute it again.

    Raises:
        NotImplementedError: rows of a block are no multiple of 16.
    """
    from . import _triton_launch as launches

    blocks, grad, x = _blocks(index, layout), _rows(grad_output), _rows(input)
    out = [input.new_empty(0) for _ in wanted]
    if wanted[0] or wanted[1]:
        grad_hidden = grad @ b
        if wanted[0] and len(grad):
            named = grad, grad_hidden, _rows(a), values.contiguous(), blocks, scale
            out[0] = launches.input_gradient(*named)
        elif wanted[0]:
            out[0] = torch.empty_like(x)
        if wanted[1]:
            out[1] = scaled(grad_hidden.t(), x, scale)
    if wanted[2]:
        out[2] = scaled(grad.t(), x @ a.t() if hidden.ndim == 1 else hidden, scale)
    if wanted[3]:
        some = len(grad) > 0
        out[3] = (
            launches.values_gradient(grad, x, len(values), blocks)
            if some
            else torch.zeros_like(values)
        )
    if wanted[4]:
        out[4] = grad.sum(0)
    return tuple(out)


def _blocks(index: list[Tensor], layout: list[int]) -> Blocks:
    from ._index import GroupIndex
    from ._triton_launch import Blocks

    if layout[3] % 16:
        raise NotImplementedError(
            f"blocks of {layout[3]} rows have no fused kernel on GPUs; pass a multiple of 16 rows"
        )
    return Blocks(GroupIndex(*index), *layout[1:])


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
