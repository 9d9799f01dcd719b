"""The public face of packed attention."""

from typing import Any

import torch
from torch import Tensor

from .._common.shapes import bind_shapes
from . import ops

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensor:
        out, lse = ops.forward(q, k, v, cu_q, cu_k, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_out: Tensor
    ) -> tuple[Tensor | None, ...]:
        grads = ops.backward(grad_out, *ctx.saved_tensors, ctx.causal, ctx.scale)
        return *grads, None, None, None, None


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    impl: str = "fused",
) -> Tensor:
    """Return softmax attention of packed documents; no document sees another.

    Query head h attends with key head h // (H / K). Rows that see no key give 0 and get gradient
    0: of a document without keys, of a causal document with more queries than keys, and all tokens
    after the last boundary.

    Shapes: q (T, H, D); k, v (S, K, D), H a multiple of K; cu_seqlens (N + 1,); result (T, H, D).
    Precision: sums in float32 (float64 for float64); result in q's dtype. On CPUs with matrix units
    for bfloat16 its probabilities are bfloat16 too. ``"reference"`` computes in q's dtype.
    Deterministic, and a document's bits do not depend on what it is packed with.

    Args:
        q: queries of all documents, one after the other.
        k: keys.
        v: values.
        cu_seqlens_q: int32 or int64 boundaries of the documents in q, on the CPU or q's device:
            document n is rows ``cu_seqlens_q[n]`` to ``cu_seqlens_q[n + 1]``. Starts at 0; empty
            documents are allowed. Boundaries on another device than the CPU are copied to it.
        cu_seqlens_k: the same for k and v; default: those of q.
        max_seqlen_q: longest document; a hint, never changes the result.
        max_seqlen_k: the same for k.
        causal: query i of L sees the keys up to i + S - L of the document's S (bottom right).
        softmax_scale: factor on the scores; default D ** -0.5.
        impl: ``"fused"`` (one registered operation, differentiable once) or ``"reference"`` (plain
            PyTorch, differentiable any number of times).

    Raises:
        ValueError: shapes, dtypes, devices or boundaries disagree, or ``impl`` is unknown.

    Source: Dao 2023, arXiv:2307.08691, algorithms 1 and 2; arguments as in that paper's library,
    ``flash_attn_varlen_func``.
    """
    _check_heads(q, k, v)
    # torch.compile refuses one tensor in two places of an autograd.Function
    cu_k = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
    _check_boundaries(q, cu_seqlens_q, cu_k)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if impl == "fused":
        k, v = (k.view_as(k) if k is q else k), (v.view_as(v) if v is k or v is q else v)
        return _VarlenAttention.apply(q, k, v, cu_seqlens_q, cu_k, causal, scale)
    if impl == "reference":
        from . import _reference as reference

        return reference.forward(q, k, v, cu_seqlens_q, cu_k, causal, scale)[0]
    raise ValueError(f"impl must be 'fused' or 'reference', got {impl!r}")


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    size = bind_shapes(q=(q, "T H D"), k=(k, "S K D"), v=(v, "S K D"))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k, v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them"
        )
    if q.dtype not in _DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; expected float16, bfloat16, float32 or float64")
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k, v must be on one device, got {q.device}, {k.device} and {v.device}; move them"
        )
    if size["D"] == 0 or size["K"] == 0 or size["H"] == 0 or size["H"] % size["K"]:
        raise ValueError(
            f"q has H={size['H']} heads of D={size['D']} and k has K={size['K']} heads; "
            "H must be a multiple of K, and none may be 0"
        )


def _check_boundaries(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> None:
    named = {"cu_seqlens_q": cu_seqlens_q}
    if cu_seqlens_k is not None:
        named["cu_seqlens_k"] = cu_seqlens_k
    bind_shapes(**{name: (bounds, "N+1") for name, bounds in named.items()})
    for name, bounds in named.items():
        if bounds.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} has dtype {bounds.dtype}; expected int32 or int64")
        if bounds.device not in (q.device, torch.device("cpu")):
            raise ValueError(
                f"{name} is on {bounds.device}; expected cpu or {q.device}, where q is"
            )
