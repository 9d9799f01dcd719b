"""Launching the product's kernel: which axes are two, tiles, arguments."""

from typing import Any

import torch
import triton
from torch import Tensor

from .._common.triton_launch import capability, compiled_by, launch
from .._common.triton_tiles import Tiles
from ._triton_kernel import product_kernel


def configurations(major: int, itemsize: int) -> list[Tiles]:
    """Return the ways to compile a product, the best first; all cut the result alike.

    Not tuned on a GPU: the largest tiles without spills on sm_80 and sm_90.

    Args:
        major: of the compute capability.
        itemsize: bytes of an element; 4 are multiplied without tensor cores.
    """
    if itemsize == 4:
        return [Tiles(None, 64, 64, 16, 4, stages) for stages in (3, 2)]
    depth, warps = (64, 8) if major >= 9 else (32, 8)
    return [Tiles(None, 128, 128, depth, warps, stages) for stages in (4, 3, 2)]


def product(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
    """Write left right + bias into out; every axis of a matrix is two, an outer and an inner one.

    Shapes: left (b, M', M, K', K), right (b, K', K, N', N), out (b, M', M, N', N); any strides.
    bias lies in memory as a row of out does.
    """
    batch, outer_m, inner_m, outer_n, inner_n = out.shape
    outer_k, inner_k = right.shape[1:3]
    arguments: dict[str, Any] = {
        "out_ptr": out,
        "left_ptr": left,
        "right_ptr": right,
        "bias_ptr": bias,
        "batch": batch,
        "M": outer_m * inner_m,
        "N": outer_n * inner_n,
        "K": outer_k * inner_k,
        **_strides("left", "mk", left),
        **_strides("right", "kn", right),
        **_strides("out", "mn", out),
        # 0: one axis, which costs no division
        "INNER_M": inner_m if outer_m > 1 else 0,
        "INNER_N": inner_n if outer_n > 1 else 0,
        "INNER_K": inner_k if outer_k > 1 else 0,
        "PRECISION": "ieee" if out.dtype == torch.float32 else "tf32",
    }
    choices = configurations(capability(out.device)[0], out.element_size())
    tiles = triton.cdiv(arguments["M"], choices[0].rows)
    tiles *= triton.cdiv(arguments["N"], choices[0].columns)
    key = (out.device, out.dtype, choices[0], *compiled_by(arguments))
    launch(product_kernel, tiles * batch, arguments, choices, key)


def _strides(name: str, axes: str, matrix: Tensor) -> dict[str, int]:
    batch, *pairs = matrix.stride()
    (first, second), found = axes, {f"stride_{name}_b": batch}
    found |= {f"far_{name}_{first}": pairs[0], f"stride_{name}_{first}": pairs[1]}
    return found | {f"far_{name}_{second}": pairs[2], f"stride_{name}_{second}": pairs[3]}
