"""One document after the other, on any device: torch's fused CPU attention, or dense blocks.

A document is computed alone, from its own rows and lengths, so its result does not depend on what
it is packed with, bit for bit.
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._documents import documents
from .ops import statistics_dtype

# query rows of a dense block: bounds its memory to rows x keys and lets causal skip key columns;
# 64 rows are faster by up to a tenth, but sum the gradients of keys over longer, less exact runs
_BLOCK_ROWS = 32
# shorter documents derive faster in float32 even where the CPU multiplies bfloat16: backward 28
# against 68 ms at 128 tokens, 48 against 50 at 320, 81 against 69 at 512 (4,096 tokens in all,
# 8 heads of 64 channels, one thread, Xeon with AMX, 2026-11-21); forward is faster at every length
_BFLOAT16_BACKWARD_TOKENS = 320

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


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
    out = q.new_zeros(q.shape)
    lse = q.new_full(q.shape[:2], -math.inf, dtype=statistics_dtype(q.dtype))
    for rows, keys in documents(
        cu_seqlens_q, cu_seqlens_k, tokens_q=q.shape[0], tokens_k=k.shape[0], causal=causal
    ):
        one = q[rows], k[keys], v[keys]
        fits = _fused_fits(q[rows], k[keys], causal=causal, scale=scale)
        attend = _fused if fits else _dense
        out[rows], lse[rows] = attend(*one, causal=causal, scale=scale)
    return out, lse


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
    grad_q, grad_k, grad_v = (x.new_zeros(x.shape) for x in (q, k, v))
    for rows, keys in documents(
        cu_seqlens_q, cu_seqlens_k, tokens_q=q.shape[0], tokens_k=k.shape[0], causal=causal
    ):
        one = q[rows], k[keys], v[keys]
        fits = _fused_fits(q[rows], k[keys], causal=causal, scale=scale)
        derive = _fused_backward if fits else _dense_backward
        grad_q[rows], grad_k[keys], grad_v[keys] = derive(
            grad_out[rows], *one, out[rows], lse[rows], causal=causal, scale=scale
        )
    return grad_q, grad_k, grad_v


def _fused_fits(q: Tensor, k: Tensor, *, causal: bool, scale: float) -> bool:
    # torch's kernel aligns causal at the top left, ours only for equal lengths, and scales what it
    # has masked: -inf times 0 or less
    return q.device.type == "cpu" and (not causal or (q.shape[0] == k.shape[0] and scale > 0))


def _fused(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    dtype = q.dtype if _is_native(q.dtype) else statistics_dtype(q.dtype)
    out, lse = _flash_forward(*_batch_of_one(dtype, q, k, v), 0.0, causal, scale=scale)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _fused_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    long = min(q.shape[0], k.shape[0]) >= _BFLOAT16_BACKWARD_TOKENS
    dtype = q.dtype if long and _is_native(q.dtype) else lse.dtype
    g, q, k, v, out = _batch_of_one(dtype, grad_out, q, k, v, out)
    lse = lse.transpose(0, 1)[None]  # (1, H, T)
    grads = _flash_backward(g, q, k, v, out, lse, 0.0, causal, scale=scale)
    grad_q, grad_k, grad_v = (grad[0].transpose(0, 1) for grad in grads)
    return grad_q, grad_k, grad_v


def _batch_of_one(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    # (L, H, D) -> (1, H, L, D); torch's kernel reads the last dimension as if it were contiguous
    cast = (x.to(dtype) for x in tensors)
    return [(x if x.stride(-1) == 1 else x.contiguous()).transpose(0, 1)[None] for x in cast]


@functools.cache
def _is_native(dtype: torch.dtype) -> bool:
    # without matrix units for it, bfloat16 takes twice the time of float32
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def _dense(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    kv_heads = k.shape[1]
    q, k, v = (x.to(statistics_dtype(q.dtype)).contiguous() for x in (q, k, v))
    keys, values = k.transpose(0, 1), v.transpose(0, 1)  # (K, S, D)
    outs, lses = [], []
    for rows, seen in _blocks(q.shape[0], k.shape[0], causal=causal):
        query = _by_kv_head(q[rows], kv_heads)
        scores = _scores(query, keys[:, :seen], q[rows].shape[0], causal=causal, scale=scale)
        outs.append(_by_row(scores.softmax(-1) @ values[:, :seen], q[rows]))
        lses.append(_by_row(scores.logsumexp(-1, keepdim=True), q[rows])[..., 0])
    return torch.cat(outs), torch.cat(lses)


def _dense_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = k.shape[1]
    grad_out, q, k, v, out = (x.to(lse.dtype).contiguous() for x in (grad_out, q, k, v, out))
    delta = (grad_out * out).sum(-1, keepdim=True)  # (T, H, 1)
    keys, values = k.transpose(0, 1), v.transpose(0, 1)  # (K, S, D)
    grad_k, grad_v = (x.new_zeros(x.shape) for x in (keys, values))
    grad_qs = []
    for rows, seen in _blocks(q.shape[0], k.shape[0], causal=causal):
        query, g, row_lse, row_delta = (
            _by_kv_head(x[rows], kv_heads) for x in (q, grad_out, lse[..., None], delta)
        )
        scores = _scores(query, keys[:, :seen], q[rows].shape[0], causal=causal, scale=scale)
        p = scores.sub_(row_lse).exp_()
        grad_v[:, :seen].baddbmm_(p.mT, g)
        grad_scores = (g @ values[:, :seen].mT).sub_(row_delta).mul_(p).mul_(scale)
        grad_k[:, :seen].baddbmm_(grad_scores.mT, query)
        grad_qs.append(_by_row(grad_scores @ keys[:, :seen], q[rows]))
    return torch.cat(grad_qs), grad_k.transpose(0, 1), grad_v.transpose(0, 1)


def _blocks(len_q: int, len_k: int, *, causal: bool) -> Iterator[tuple[slice, int]]:
    # blocks of rows, and how many keys the last row of each sees
    for start in range(0, len_q, _BLOCK_ROWS):
        end = min(start + _BLOCK_ROWS, len_q)
        yield slice(start, end), len_k - len_q + end if causal else len_k


def _scores(query: Tensor, keys: Tensor, rows: int, *, causal: bool, scale: float) -> Tensor:
    scores = (query @ keys.mT).mul_(scale)  # (K, G * rows, S)
    if causal:
        # only the last square of a block has a future to hide
        future = scores.new_full((rows, rows), -math.inf).triu(1)
        scores.unflatten(1, (-1, rows))[..., -rows:] += future
    return scores


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    # (L, H, D) -> (K, G * L, D): the query heads that share a key head become rows of one product
    return x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_row(x: Tensor, like: Tensor) -> Tensor:
    # the way back: (K, G * L, D) -> (L, H, D)
    return x.unflatten(1, (-1, like.shape[0])).permute(2, 0, 1, 3).flatten(1, 2)
