"""Contracts of the product: schemas, fake kernels, lazy dispatch."""

from types import ModuleType

import torch
from torch import Tensor

from .._common.autocast import outside_autocast

_OPERANDS = "Tensor input, Tensor a, Tensor b, Tensor values"
_SUPPORT = "Tensor[] index, int[] layout, float scale"

# input (T, m); index: RowIndex or GroupIndex; layout: 0 rows or 1 blocks, n, m, rows and columns of
# a block. hidden is input aT (T, R), or (0,) where the implementation has no use for it; the
# backward takes either. a gradient that is not wanted is (0,); wanted: input, a, b, values, bias
torch.library.define(
    "apical::sparse_low_rank_forward",
    f"({_OPERANDS}, Tensor? bias, {_SUPPORT}) -> (Tensor output, Tensor hidden)",
)
torch.library.define(
    "apical::sparse_low_rank_backward",
    f"(Tensor grad_output, {_OPERANDS}, Tensor hidden, {_SUPPORT}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def implementation(input: Tensor, layout: list[int]) -> ModuleType:  # noqa: A002
    """Return the fastest implementation that takes this call."""
    if input.is_cuda:
        from . import _cuda, _triton

        found = [module for module in (_triton, _cuda) if module.takes(input, layout)]
    else:
        from . import _cpu

        found = [_cpu] if _cpu.takes(input, layout) else []
    from . import _dense

    return found[0] if found else _dense


@outside_autocast
def _forward(
    input: Tensor,  # noqa: A002
    a: Tensor,
    b: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: list[Tensor],
    layout: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    chosen = implementation(input, layout)
    return chosen.forward(input, a, b, values, bias, index, layout, scale)


@outside_autocast
def _backward(
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
) -> Grads:
    chosen, operands = implementation(input, layout), (input, a, b, values)
    grads = chosen.backward(grad_output, *operands, hidden, index, layout, scale, wanted)
    return grads[0], grads[1], grads[2], grads[3], grads[4]


torch.library.impl("apical::sparse_low_rank_forward", "CompositeExplicitAutograd", _forward)
torch.library.impl("apical::sparse_low_rank_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("apical::sparse_low_rank_forward")
def _(
    input: Tensor,  # noqa: A002
    a: Tensor,
    b: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: list[Tensor],
    layout: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    T, kept = input.shape[0], getattr(implementation(input, layout), "KEEPS_HIDDEN", True)
    hidden = input.new_empty((T, a.shape[0]) if kept else (0,))
    return input.new_empty(T, b.shape[0]), hidden


@torch.library.register_fake("apical::sparse_low_rank_backward")
def _(
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
) -> Grads:
    shapes = (input.shape, a.shape, b.shape, values.shape, b.shape[:1])
    new = [input.new_empty(s if w else (0,)) for s, w in zip(shapes, wanted, strict=True)]
    return new[0], new[1], new[2], new[3], new[4]


forward = torch.ops.apical.sparse_low_rank_forward.default
backward = torch.ops.apical.sparse_low_rank_backward.default
