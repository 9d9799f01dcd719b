"""One loss of many tokens: its upstream gradient is one number, so the gradients come with it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import rounded


def reduced(
    backend: Any,
    operands: tuple[Tensor | None, ...],
    token_weight: Tensor,
    rules: tuple[float, ...],
    wanted: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """Return the sum of token_weight * loss, then the values, detached.

    Args:
        backend: has ``forward(*operands, token_weight, *rules, *wanted)``, which returns loss
            (T,), the values, and a gradient for each of wanted, in float32 and of its own: those
            of the sum of token_weight * loss.
        operands: the first may require grad, as many as wanted has entries.
        token_weight: (T,) float32.
        rules: numbers.
        wanted: which of the first operands want a gradient, as `wants` says.
    """
    return _Reduced.apply(backend, rules, wanted, token_weight, *operands)


def wants(*operands: Tensor | None) -> tuple[bool, ...]:
    """Return which operands want a gradient."""
    on = torch.is_grad_enabled()
    return tuple(t is not None and t.requires_grad and on for t in operands)


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
        rules: tuple[float, ...],
        wanted: tuple[bool, ...],
        token_weight: Tensor,
        *operands: Tensor | None,
    ) -> tuple[Tensor, ...]:
        loss, *others = backend.forward(*operands, token_weight, *rules, *wanted)
        values = others[: -len(wanted)]
        # kept in float32: half precision would lose them before a loss scaler's factor arrives
        ctx.grads = tuple(others[-len(wanted) :])
        ctx.save_for_backward(*operands, token_weight)
        ctx.rules, ctx.wanted, ctx.backend = rules, wanted, backend
        pairs = zip(operands[: len(wanted)], wanted, strict=True)
        ctx.dtypes = [t.dtype if t is not None and want else None for t, want in pairs]
        ctx.constants = len(operands) - len(wanted)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*values)
        return (loss * token_weight).sum(), *values

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        # handed over without a copy; a graph that is retained computes them again
        grads, ctx.grads = ctx.grads or _again(ctx), None
        scaled = [
            rounded.scaled(grad, upstream[0], dtype) if dtype else None
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return None, None, None, None, *scaled, *[None] * ctx.constants


def _again(ctx: Any) -> tuple[Tensor, ...]:
    again = ctx.backend.forward(*ctx.saved_tensors, *ctx.rules, *ctx.wanted)
    return again[-len(ctx.wanted) :]
