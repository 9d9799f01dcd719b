"""How the loss is bound to autograd: gradients come with it, or, of losses per token, later."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._common import reduced_loss as _common
from . import ops
from ._rules import Rules


class Operands(NamedTuple):
    """The tensors of a call: the first three may require grad."""

    input: Tensor  # (T, H)
    linear_weight: Tensor  # (V, H)
    linear_bias: Tensor | None  # (V,)
    ids: Tensor  # (T, K)
    id_weight: Tensor  # (T, K)
    class_weight: Tensor | None  # (V,)


def reduced(
    operands: Operands, token_weight: Tensor, rules: Rules, backend: Any = ops
) -> tuple[Tensor, ...]:
    """Return the sum of token_weight x loss, then nll, lse, entropy, correct (T,), detached."""
    return _common.reduced(backend, operands, token_weight, rules, _common.wants(*operands[:3]))


def per_token(
    operands: Operands, token_weight: Tensor, rules: Rules, backend: Any = ops
) -> tuple[Tensor, ...]:
    """Return token_weight x loss, nll, lse, entropy, correct (T,); the first three with grad."""
    return _PerToken.apply(backend, rules, token_weight, *operands)


def _dtypes(operands: Sequence[Tensor | None], wanted: tuple[bool, ...]) -> list[Any]:
    return [
        t.dtype if t is not None and want else None
        for t, want in zip(operands[:3], wanted, strict=True)
    ]


class _PerToken(torch.autograd.Function):
    """One loss per token: the backward computes the logits again, weighted by its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
        rules: Rules,
        token_weight: Tensor,
        *operands: Tensor | None,
    ) -> tuple[Tensor, ...]:
        values = backend.forward(*operands, token_weight, *rules, False, False, False)[:5]
        loss, nll, lse, entropy, correct = values
        ctx.save_for_backward(*operands, token_weight, lse)
        ctx.rules, ctx.backend = rules, backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(entropy, correct)
        return loss * token_weight, nll, lse, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *upstream: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *operands, token_weight, lse = ctx.saved_tensors
        loss, nll, lse_grad = upstream[:3]
        grad_loss = torch.zeros_like(lse) if loss is None else loss * token_weight
        wanted = ctx.needs_input_grad[3:6]
        grads = ctx.backend.backward(
            grad_loss, nll, lse_grad, *operands, lse, token_weight != 0, *ctx.rules, *wanted
        )
        dtypes = _dtypes(operands, wanted)
        rounded = [g.to(d) if d else None for g, d in zip(grads, dtypes, strict=True)]
        return None, None, None, *rounded, None, None, None
