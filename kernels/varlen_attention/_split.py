"""One document after the other, on any device: torch's fused CPU attention, or dense blocks.

A document is computed alone, from its own rows and lengths, so its result does not depend on what
it is packed with, bit for bit.
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._layout import Document, PackedLayout
from ._rules import Rules
from ._scores import Block, block_of, derivatives, dropped, gain_of, scores, unseeing_rows
from .ops import statistics_dtype

# query rows of a dense block: bounds its memory to rows x keys and lets masks skip key columns;
# 64 rows are faster by up to a tenth, but sum the gradients of keys over longer, less exact runs
_BLOCK_ROWS = 32
# shorter documents derive faster in float32 even where the CPU multiplies bfloat16: backward 28
# against 68 ms at 128 tokens, 48 against 50 at 320, 81 against 69 at 512 (4,096 tokens in all,
# 8 heads of 64 channels, one thread, Xeon with AMX, 2026-11-21); forward is faster at every length
_BFLOAT16_BACKWARD_TOKENS = 320

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Return the result (T, H, E) in q's dtype and lse (T, H), -inf where a row sees no key."""
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = q.new_full(q.shape[:2], -math.inf, dtype=statistics_dtype(q.dtype))
    for document in layout.documents(rules.right):
        rows, keys = document.queries, document.keys
        attend = _fused if _fused_fits(q[rows], k[keys], v, rules) else _dense
        out[rows], lse[rows] = attend(q[rows], k[keys], v[keys], document, rules)
    return out, unseeing_rows(lse, layout.bounds_q[-1], rules)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: PackedLayout,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v and the gain, from the saved result and lse."""
    grads = [x.new_zeros(x.shape) for x in (q, k, v)]
    grad_gain = None if rules.gain is None else lse.new_zeros(lse.shape)
    for document in layout.documents(rules.right):
        rows, keys = document.queries, document.keys
        saved = grad_out[rows], q[rows], k[keys], v[keys], out[rows], lse[rows]
        if grad_lse is None and _fused_fits(q[rows], k[keys], v, rules):
            found = _fused_backward(*saved, rules)
        else:
            given = None if grad_lse is None else grad_lse[rows]
            *found, of_gain = _dense_backward(given, *saved, document, rules)
            if grad_gain is not None and of_gain is not None:
                grad_gain[rows] = of_gain
        for grad, place, value in zip(grads, (rows, keys, keys), found, strict=True):
            grad[place] = value
    return grads[0], grads[1], grads[2], grad_gain


def _fused_fits(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> bool:
    # torch's kernel aligns causal at the top left, ours only for equal lengths, and scales what it
    # has masked: -inf times 0 or less
    aligned = rules.causal and len(q) == len(k) and rules.scale > 0
    known = rules.plain and (rules.full or aligned)
    return q.device.type == "cpu" and known and q.shape[2] == v.shape[2]


def _fused(
    q: Tensor, k: Tensor, v: Tensor, document: Document, rules: Rules
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype if _is_native(q.dtype) else statistics_dtype(q.dtype)
    batch = _batch_of_one(dtype, q, k, v)
    out, lse = _flash_forward(*batch, 0.0, rules.causal, scale=rules.scale)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _fused_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor]:
    long = min(q.shape[0], k.shape[0]) >= _BFLOAT16_BACKWARD_TOKENS
    dtype = q.dtype if long and _is_native(q.dtype) else lse.dtype
    g, q, k, v, out = _batch_of_one(dtype, grad_out, q, k, v, out)
    lse = lse.transpose(0, 1)[None]  # (1, H, T)
    grads = _flash_backward(g, q, k, v, out, lse, 0.0, rules.causal, scale=rules.scale)
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


def _dense(
    q: Tensor, k: Tensor, v: Tensor, document: Document, rules: Rules
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.to(statistics_dtype(q.dtype)).contiguous() for x in (q, k, v))
    keys, values = k.transpose(0, 1), v.transpose(0, 1)  # (K, J, D), (K, J, E)
    outs, lses = [], []
    for rows, seen, block in _blocks(document, rules):
        products = _heads(_by_kv_head(q[rows], len(keys)) @ keys[:, seen].mT, block)
        s = scores(products.mul_(rules.scale), gain_of(block, rules), block, rules)
        lse = s.logsumexp(-1)
        if rules.sinks is not None:
            lse = torch.logaddexp(lse, rules.sinks.to(lse.dtype)[:, None])
        p = dropped(_probabilities(s, lse), block, rules)
        outs.append(_by_row(_kv_heads(p, len(keys)) @ values[:, seen], q[rows]))
        lses.append(lse.T)
    return torch.cat(outs), torch.cat(lses)


def _dense_backward(
    grad_lse: Tensor | None,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    document: Document,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    grad_out, q, k, v, out = (x.to(lse.dtype).contiguous() for x in (grad_out, q, k, v, out))
    delta = (grad_out * out).sum(-1)  # (I, H)
    delta = delta if grad_lse is None else delta - grad_lse
    keys, values = k.transpose(0, 1), v.transpose(0, 1)  # (K, J, D), (K, J, E)
    grad_k, grad_v = (x.new_zeros(x.shape) for x in (keys, values))
    grad_qs, grad_gains = [], []
    for rows, seen, block in _blocks(document, rules):
        query, g = (_by_kv_head(x[rows], len(keys)) for x in (q, grad_out))
        products = _heads(query @ keys[:, seen].mT, block).mul_(rules.scale)
        gain = gain_of(block, rules)
        p = _probabilities(scores(products, gain, block, rules), lse[rows].T)
        grad_v[:, seen].baddbmm_(_kv_heads(dropped(p, block, rules), len(keys)).mT, g)
        grad_p = dropped(_heads(g @ values[:, seen].mT, block), block, rules)
        grad_s = grad_p.sub_(delta[rows].T[:, :, None]).mul_(p)
        by_products, by_gain = derivatives(products, gain, rules)
        if by_gain is not None:
            grad_gains.append((grad_s * by_gain).sum(-1).T)
        grad_x = grad_s if by_products is None else grad_s.mul_(by_products)
        grad_x = _kv_heads(grad_x.mul(rules.scale), len(keys))
        grad_k[:, seen].baddbmm_(grad_x.mT, query)
        grad_qs.append(_by_row(grad_x @ keys[:, seen], q[rows]))
    grad_gain = None if rules.gain is None else torch.cat(grad_gains)
    return torch.cat(grad_qs), grad_k.transpose(0, 1), grad_v.transpose(0, 1), grad_gain


def _blocks(document: Document, rules: Rules) -> Iterator[tuple[slice, slice, Block]]:
    # rows of a document, the keys that any of them sees, and where both stand
    count = document.queries.stop - document.queries.start
    for start in range(0, count, _BLOCK_ROWS):
        rows = slice(start, min(start + _BLOCK_ROWS, count))
        block = block_of(document, rules, rows.start, rows.stop)
        yield rows, slice(block.first_key, block.first_key + block.keys), block


def _probabilities(s: Tensor, lse: Tensor) -> Tensor:
    # a row without a finite score has lse -inf, and probability 0 all the same
    return (s - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()


def _heads(x: Tensor, block: Block) -> Tensor:
    # (K, G * I, J) -> (H, I, J)
    return x.unflatten(1, (-1, block.rows)).flatten(0, 1)


def _kv_heads(x: Tensor, kv_heads: int) -> Tensor:
    # the way back: (H, I, J) -> (K, G * I, J)
    return x.unflatten(0, (kv_heads, -1)).flatten(1, 2)


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    # (I, H, D) -> (K, G * I, D): the query heads that share a key head become rows of one product
    return x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_row(x: Tensor, like: Tensor) -> Tensor:
    # the way back: (K, G * I, D) -> (I, H, D)
    return x.unflatten(1, (-1, like.shape[0])).permute(2, 0, 1, 3).flatten(1, 2)
