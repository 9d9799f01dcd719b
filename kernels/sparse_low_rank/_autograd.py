"""The one autograd node of the product: the registered operation and its gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops
from ._index import Index


class Rules(NamedTuple):
    """What is not a tensor."""

    layout: list[int]  # of the op's schema
    scale: float
    recompute: bool


class _SparseLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rules: Rules,
        input: Tensor,  # noqa: A002
        a: Tensor,
        b: Tensor,
        values: Tensor,
        bias: Tensor | None,
        *index: Tensor,
    ) -> Tensor:
        output, hidden = ops.forward(input, a, b, values, bias, index, rules.layout, rules.scale)
        # b's gradient alone reads it
        again = rules.recompute or not ctx.needs_input_grad[3]
        kept = hidden.new_empty(0) if again else hidden
        ctx.save_for_backward(input, a, b, values, kept, *index)
        ctx.rules = rules
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        input, a, b, values, hidden, *index = ctx.saved_tensors  # noqa: A001
        wanted = list(ctx.needs_input_grad[1:6])
        operands = (grad_output, input, a, b, values, hidden)
        grads = ops.backward(*operands, index, ctx.rules.layout, ctx.rules.scale, wanted)
        given = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        return None, *given, *[None] * len(index)


def product(operands: tuple[Tensor | None, ...], index: Index, rules: Rules) -> Tensor:
    """Return the product (T, n) of input, a, b, values and bias, differentiable once."""
    return _SparseLowRank.apply(rules, *operands, *index)
