"""The one autograd node of packed attention: the registered operation and its gradient."""

import math
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._rules import Rules


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor | None,
        slopes: Tensor | None,
        sinks: Tensor | None,
        gain: Tensor | None,
        seed: Tensor | None,
        *numbers: Any,
    ) -> tuple[Tensor, Tensor]:
        rules = slopes, sinks, gain, seed, *numbers
        out, lse = ops.forward(q, k, v, cu_q, cu_k, *rules)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, slopes, sinks, gain, seed)
        ctx.numbers = numbers
        # most callers have no use for lse, nor time for a gradient of zeros
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *saved, slopes, sinks, gain, seed = ctx.saved_tensors
        out, lse = saved[3:5]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        rules = slopes, sinks, gain, seed, *ctx.numbers
        grad_q, grad_k, grad_v, grad_gain = ops.backward(grad_out, grad_lse, *saved, *rules)
        grad_sinks = None if sinks is None else _of_sinks(grad_out, grad_lse, out, lse, sinks)
        nothing = (None,) * len(ctx.numbers)
        of_gain = None if gain is None else grad_gain
        return grad_q, grad_k, grad_v, None, None, None, grad_sinks, of_gain, None, *nothing


def _of_sinks(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor
) -> Tensor:
    # a sink is a key without a value: it takes probability from the others. rows that see no key
    # have the result 0, and may hold anything
    empty = (out == 0).all(-1)
    given = -(grad_out.to(lse.dtype).contiguous() * out).sum(-1).masked_fill(empty, 0.0)
    given = given if grad_lse is None else given + grad_lse
    taken = ((sinks - lse).exp() * given).masked_fill(lse == -math.inf, 0.0)
    # over all tokens: partial sums may be far larger than the sum
    return taken.sum(0, dtype=torch.float64).to(sinks.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Return the result (T, H, E) and lse (T, H), both differentiable."""
    # torch.compile refuses one tensor in two places of an autograd.Function
    k, v = (k.view_as(k) if k is q else k), (v.view_as(v) if v is k or v is q else v)
    out, lse = _VarlenAttention.apply(q, k, v, cu_q, cu_k, *rules)
    return out, lse
