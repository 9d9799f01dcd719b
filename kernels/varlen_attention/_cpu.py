"""The C++ kernel of the CPU: float32, one task per document and key head."""

import functools
import math

import torch
from torch import Tensor

from .._common import native
from ._documents import documents

# head sizes up to which a block of keys stays in the second level of cache
_LARGEST_HEAD = 256


def takes(q: Tensor) -> bool:
    """Return whether this can compute attention of q, and faster than torch's own kernel."""
    known = q.dtype != torch.float64 and q.shape[-1] <= _LARGEST_HEAD
    return q.device.type == "cpu" and known and not _is_native(q.dtype) and native.loaded()


@functools.cache
def _is_native(dtype: torch.dtype) -> bool:
    # with matrix units for bfloat16 torch's kernel is faster: forward and backward 489 against 650
    # ms, causal 448 against 511 (64 documents, 19,709 tokens, 8 heads of 64 channels, one thread,
    # Xeon with AMX, 2026-11-21)
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the result (T, H, D) in q's dtype and lse (T, H), -inf where a row sees no key."""
    rows = _rows(q, k, cu_seqlens_q, cu_seqlens_k, causal=causal)
    out = _outside_zero(q, rows[:, :2])
    lse = q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
    torch.ops.apical.varlen_attention_cpu_forward(*_float32(q, k, v), rows, causal, scale, out, lse)
    return out.to(q.dtype), lse


def backward(
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
    """Return the gradients of q, k and v, from the saved result and lse."""
    rows = _rows(q, k, cu_seqlens_q, cu_seqlens_k, causal=causal)
    grad_q = _outside_zero(q, rows[:, :2])
    grad_k, grad_v = (_outside_zero(x, rows[:, 2:]) for x in (k, v))
    torch.ops.apical.varlen_attention_cpu_backward(
        *_float32(grad_out, q, k, v, out), lse, rows, causal, scale, grad_q, grad_k, grad_v
    )
    return grad_q.to(q.dtype), grad_k.to(q.dtype), grad_v.to(q.dtype)


def _rows(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, *, causal: bool
) -> Tensor:
    found = documents(
        cu_seqlens_q, cu_seqlens_k, tokens_q=q.shape[0], tokens_k=k.shape[0], causal=causal
    )
    ends = [(rows.start, rows.stop, keys.start, keys.stop) for rows, keys in found]
    return torch.tensor(ends, dtype=torch.int64).view(-1, 4)


def _outside_zero(like: Tensor, ranges: Tensor) -> Tensor:
    # where documents cover all rows, the kernel writes all of them
    covered = int(ranges.diff().sum()) == like.shape[0]
    new = like.new_empty if covered else like.new_zeros
    return new(like.shape, dtype=torch.float32)


def _float32(*tensors: Tensor) -> list[Tensor]:
    # tokens and heads may lie anywhere, channels one after the other
    wide = (x.float() for x in tensors)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in wide]
