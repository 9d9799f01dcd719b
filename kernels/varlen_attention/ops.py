"""Contracts of packed attention: schemas, fake kernels, lazy dispatch."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._common.autocast import outside_autocast
from ._layout import layout_of
from ._rules import Rules

# Rules, flat; tests/kernels holds the two against each other
_RULES = (
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? gain, Tensor? seed, float scale, int left,"
    " int right, int limit, str transform, float a, float b, float dropout"
)
torch.library.define(
    "apical::varlen_attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor? cu_seqlens_k,"
    f" {_RULES}) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "apical::varlen_attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" Tensor cu_seqlens_q, Tensor? cu_seqlens_k, {_RULES})"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_gain)",
)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of sums and of lse: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def implementation(q: Tensor, v: Tensor, rules: Rules) -> ModuleType:
    """Return the fastest implementation that takes this call."""
    from . import _cpu, _split

    if q.is_cuda:
        from . import _triton

        return _triton if _triton.takes(q, v, rules) else _split
    return _cpu if _cpu.takes(q, v, rules) else _split


@outside_autocast
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, *flat: Any
) -> tuple[Tensor, Tensor]:
    rules = Rules(*flat)
    layout = layout_of(cu_seqlens_q, cu_seqlens_k, tokens_q=q.shape[0], tokens_k=k.shape[0])
    return implementation(q, v, rules).forward(q, k, v, layout, rules)


@outside_autocast
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rules = Rules(*flat)
    layout = layout_of(cu_seqlens_q, cu_seqlens_k, tokens_q=q.shape[0], tokens_k=k.shape[0])
    *grads, grad_gain = implementation(q, v, rules).backward(
        grad_out, grad_lse, q, k, v, out, lse, layout, rules
    )
    # an op returns a tensor where there is nothing, too
    return *grads, lse.new_empty(0) if grad_gain is None else grad_gain


torch.library.impl("apical::varlen_attention_forward", "CompositeExplicitAutograd", _forward)
torch.library.impl("apical::varlen_attention_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("apical::varlen_attention_forward")
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, *flat: Any
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:2], dtype=statistics_dtype(q.dtype))
    return q.new_empty(*q.shape[:2], v.shape[2]), lse


@torch.library.register_fake("apical::varlen_attention_backward")
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gain = Rules(*flat).gain
    grad_gain = lse.new_empty(0 if gain is None else lse.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_gain


forward = torch.ops.apical.varlen_attention_forward.default
backward = torch.ops.apical.varlen_attention_backward.default
