"""The backward pass on NVIDIA GPUs: a kernel over rows of q, then one over keys.

Neither adds to memory that another program writes: the gradients are the same bits in every run.
In return both compute the probabilities, seven products of matrices instead of five.
"""

from typing import Any

import torch
from torch import Tensor

from .._common.triton_launch import capability, compiled_by, launch
from .._common.triton_tiles import fits_tma
from ._layout import PackedLayout
from ._rules import Rules
from ._tiles import Tiles
from ._triton_backward_keys import backward_keys_kernel
from ._triton_backward_keys import configurations as configurations_keys
from ._triton_backward_queries import backward_queries_kernel
from ._triton_backward_queries import configurations as configurations_queries
from ._triton_forward import arguments_of
from ._triton_launch import Configuration, rows_of

# transforms that take more registers than the widest tiles leave
_HEAVY = ("softplus", "power")


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: PackedLayout,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v, and of the gain if there is one."""
    values = backward_arguments(grad_out, grad_lse, q, k, v, out, lse, layout, rules)
    # the long documents first: the short ones fill the gaps at the end
    for tiles in reversed(layout.tiles("q", q.device, rules.causal)):
        launch_queries(tiles, values)
    for tiles in reversed(layout.tiles("k", q.device, rules.causal)):
        launch_keys(tiles, values)
    return values["dq_ptr"], values["dk_ptr"], values["dv_ptr"], values["dgain_ptr"]


def backward_arguments(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: PackedLayout,
    rules: Rules,
) -> dict[str, Any]:
    """Return the arguments of both kernels, the gradients among them, but tiles and blocks."""
    q, k, v, grad, out = (rows_of(x) for x in (q, k, v, grad_out, out))
    tma = all(fits_tma(x) for x in (q, k, v) if x.shape[-1])
    if tma and grad.numel() and not fits_tma(grad):
        grad = grad.contiguous()
    # lse and delta of each head; every document begins at a multiple of 16 bytes
    columns = (len(q) // 4 + len(layout.bounds_q)) * 4
    stats = q.new_empty((2 * q.shape[1], columns), dtype=torch.float32)
    end_q, end_k = layout.bounds_q[-1], layout.bounds_k[-1]
    return {
        **arguments_of(q, k, v, out, lse.contiguous(), layout, rules),
        "grad_ptr": grad,
        "grad_lse_ptr": None if grad_lse is None else grad_lse.contiguous(),
        "stats_ptr": stats,
        "dq_ptr": _zero_after(end_q, torch.empty_like(q, memory_format=torch.contiguous_format)),
        "dk_ptr": _zero_after(end_k, torch.empty_like(k, memory_format=torch.contiguous_format)),
        "dv_ptr": _zero_after(end_k, torch.empty_like(v, memory_format=torch.contiguous_format)),
        "dgain_ptr": None if rules.gain is None else _zero_after(end_q, torch.empty_like(lse)),
        "stride_gt": grad.stride(0),
        "stride_gh": grad.stride(1),
        "stride_oh": out.stride(1),
        "stride_stats": stats.stride(0),
        "key_heads": k.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "situation": {"tma": tma, "heavy": rules.seed is not None or rules.transform in _HEAVY},
    }


def launch_queries(tiles: Tiles, values: dict[str, Any]) -> None:
    """Write dq, dgain and the statistics of the rows of these tiles."""
    choices = configurations_queries(*_situation(tiles, values), **values["situation"])
    parts = tiles.rows // choices[0].queries
    _launch(backward_queries_kernel, tiles, parts, values["heads"], choices, values)


def launch_keys(tiles: Tiles, values: dict[str, Any]) -> None:
    """Write dk and dv of these tiles; the statistics of the rows that see them are there."""
    choices = configurations_keys(*_situation(tiles, values), **values["situation"])
    parts = tiles.rows // choices[0].keys
    _launch(backward_keys_kernel, tiles, parts, values["key_heads"], choices, values)


def _situation(tiles: Tiles, values: dict[str, Any]) -> tuple[int, int, int, int]:
    q = values["q_ptr"]
    columns = max(values["BLOCK_D"], values["BLOCK_E"])
    return capability(q.device)[0], tiles.rows, columns, q.element_size()


def _launch(
    kernel: Any,
    tiles: Tiles,
    parts: int,
    heads: int,
    choices: list[Configuration],
    values: dict[str, Any],
) -> None:
    named = {**values, "where_ptr": tiles.where, "PARTS": parts}
    arguments = {name: named[name] for name in kernel.arg_names if name in named}
    q = values["q_ptr"]
    tma = values["situation"]["tma"]
    key = (kernel, capability(q.device), q.dtype, tiles.rows, tma, *compiled_by(arguments))
    launch(kernel, len(tiles.where) * parts * heads, arguments, [*choices], key)


def _zero_after(end: int, x: Tensor) -> Tensor:
    # tokens after the last boundary are in no tile
    x[end:] = 0.0
    return x
