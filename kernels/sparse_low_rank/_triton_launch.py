"""Launching the kernels of blocks: tiles, parts of the tokens, arguments of each kernel."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._common.triton_launch import capability, compiled_by, launch, processors
from .._common.triton_tiles import Tiles, fits_tma
from . import _triton_kernels as kernels
from ._index import GroupIndex
from ._triton_tiles import configurations

# tokens of a part of the values' gradient, at least: fewer are not worth a sum over the parts
_SPAN = 512


class Blocks(NamedTuple):
    """Which blocks are stored, on the device, and how large they are."""

    listed: GroupIndex
    out_features: int
    in_features: int
    rows: int
    columns: int

    @property
    def constants(self) -> dict[str, int | bool]:
        """What every kernel is told of them."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "EVEN": self.out_features % 16 == 0,
        }

    @property
    def run(self) -> int:
        """How many columns follow one another, as a power of two that the compiler can use."""
        return math.gcd(self.columns, 16)


def forward(
    x: Tensor, hidden: Tensor, b: Tensor, values: Tensor, bias: Tensor | None, blocks: Blocks,
    scale: float,
) -> Tensor:  # fmt: skip
    """Return scale hidden b.T + x S.T + bias."""
    (T, M), N = x.shape, blocks.out_features
    out = x.new_empty(T, N)
    arguments = {
        "out_ptr": out,
        "hidden_ptr": hidden,
        "b_ptr": b,
        "x_ptr": x,
        "values_ptr": values,
        "bias_ptr": bias,
        "starts_ptr": blocks.listed.group_starts,
        "chunks_ptr": blocks.listed.chunks,
        "T": T,
        "N": N,
        "M": M,
        "R": hidden.shape[1],
        "stride_hidden": hidden.stride(0),
        "stride_b": b.stride(0),
        "stride_x": x.stride(0),
        "stride_out": out.stride(0),
        "scale": scale,
        **blocks.constants,
        "RUN": blocks.run,
        "PRECISION": _precision(x),
    }
    choices = _choices(out, (hidden, b), columns=blocks.rows, depth=64)
    _launch(kernels.forward_kernel, _tiles(out, choices), arguments, choices)
    return out


def input_gradient(
    grad: Tensor, hidden: Tensor, a: Tensor, values: Tensor, blocks: Blocks, scale: float
) -> Tensor:
    """Return scale hidden a + grad S."""
    T, M = len(grad), blocks.in_features
    out = grad.new_empty(T, M)
    listed = blocks.listed
    arguments = {
        "out_ptr": out,
        "hidden_ptr": hidden,
        "a_ptr": a,
        "grad_ptr": grad,
        "values_ptr": values,
        "starts_ptr": listed.group_starts,
        "chunks_ptr": listed.chunks,
        "chunk_starts_ptr": listed.chunk_starts,
        "groups_ptr": listed.groups,
        "order_ptr": listed.order,
        "T": T,
        "N": blocks.out_features,
        "M": M,
        "R": hidden.shape[1],
        "stride_hidden": hidden.stride(0),
        "stride_a": a.stride(0),
        "stride_grad": grad.stride(0),
        "stride_out": out.stride(0),
        "scale": scale,
        **blocks.constants,
        "PRECISION": _precision(grad),
    }
    choices = _choices(out, (hidden, a, grad), columns=128, depth=blocks.rows)
    _launch(kernels.input_kernel, _tiles(out, choices), arguments, choices)
    return out


def values_gradient(grad: Tensor, x: Tensor, stored: int, blocks: Blocks) -> Tensor:
    """Return (grad.T x) at the blocks: parts of the tokens, summed in their order."""
    T, N = grad.shape
    groups = len(blocks.listed.group_starts) - 1
    width = math.ceil(len(blocks.listed.chunks) / groups) * blocks.columns
    choices = _values_choices(grad, width, blocks.rows)
    across = triton.cdiv(width, choices[0].rows)
    programs = across * triton.cdiv(N, choices[0].columns)
    span = _span(T, programs, processors(grad.device), choices[0].depth)
    parts = triton.cdiv(T, span)
    # rounded once, after the sum over the parts
    out = grad.new_empty(parts, stored, dtype=grad.dtype if parts == 1 else torch.float32)
    arguments = {
        "out_ptr": out,
        "grad_ptr": grad,
        "x_ptr": x,
        "starts_ptr": blocks.listed.group_starts,
        "chunks_ptr": blocks.listed.chunks,
        "T": T,
        "N": N,
        "S": stored,
        "stride_grad": grad.stride(0),
        "stride_x": x.stride(0),
        "across": across,
        "span": span,
        **blocks.constants,
        "RUN": blocks.run,
        "PRECISION": _precision(grad),
    }
    _launch(kernels.values_kernel, programs * parts, arguments, choices)
    return out[0] if parts == 1 else out.sum(0).to(grad.dtype)


def _span(tokens: int, programs: int, available: int, depth: int) -> int:
    # as many parts as keep every multiprocessor busy twice over
    parts = min(triton.cdiv(2 * available, programs), triton.cdiv(tokens, _SPAN))
    return triton.cdiv(triton.cdiv(tokens, parts), depth) * depth


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _choices(out: Tensor, loaded: tuple[Tensor, ...], *, columns: int, depth: int) -> list[Tiles]:
    T, N = out.shape
    few = triton.cdiv(T, 256) * triton.cdiv(N, 128) < 2 * processors(out.device)
    tma = all(fits_tma(x) for x in loaded)
    major = capability(out.device)[0]
    return configurations(major, out.element_size(), tma=tma, few=few, columns=columns, depth=depth)


def _values_choices(grad: Tensor, width: int, rows: int) -> list[Tiles]:
    # tiles of `width` columns of blocks, as far as they are wanted
    major, tma = capability(grad.device)[0], fits_tma(grad)
    found = configurations(major, grad.element_size(), tma=tma, few=True, columns=rows, depth=64)
    return [each._replace(rows=64) if width <= 64 else each for each in found]


def _tiles(out: Tensor, choices: list[Tiles]) -> int:
    return triton.cdiv(len(out), choices[0].rows) * triton.cdiv(out.shape[1], choices[0].columns)


def _launch(kernel: Any, programs: int, arguments: dict[str, Any], choices: list[Tiles]) -> None:
    x = arguments["out_ptr"]
    dtypes = [each.dtype for each in arguments.values() if isinstance(each, Tensor)]
    key = (kernel.__name__, x.device, *dtypes, choices[0], *compiled_by(arguments))
    launch(kernel, programs, arguments, choices, key)
