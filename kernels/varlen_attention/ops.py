"""Contracts of packed attention: schemas, fake kernels, lazy dispatch."""

import torch
from torch import Tensor

from .._common.autocast import outside_autocast

torch.library.define(
    "apical::varlen_attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, bool causal,"
    " float scale) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "apical::varlen_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q,"
    " Tensor? cu_seqlens_k, bool causal, float scale) -> (Tensor, Tensor, Tensor)",
)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of sums and of lse: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@outside_autocast
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from . import _cpu as cpu
    from . import _split as split

    compute = cpu.forward if cpu.takes(q) else split.forward
    return compute(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale)


@outside_autocast
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import _cpu as cpu
    from . import _split as split

    derive = cpu.backward if cpu.takes(q) else split.backward
    return derive(grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, scale)


# every device: without a kernel of ours, a loop over documents made of torch's own operations
torch.library.impl("apical::varlen_attention_forward", "CompositeExplicitAutograd", _forward)
torch.library.impl("apical::varlen_attention_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("apical::varlen_attention_forward")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:2], dtype=statistics_dtype(q.dtype))
    return q.new_empty(q.shape), lse


@torch.library.register_fake("apical::varlen_attention_backward")
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


forward = torch.ops.apical.varlen_attention_forward.default
backward = torch.ops.apical.varlen_attention_backward.default
