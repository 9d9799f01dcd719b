"""What attention inside documents is: plain PyTorch, any precision, differentiable twice."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ._layout import Document, PackedLayout
from ._rules import Rules
from ._scores import block_of, dropped, gain_of, scores, unseeing_rows
from .ops import statistics_dtype


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Return the result (T, H, E) in q's dtype, and the log of the softmax denominators (T, H)."""
    live = layout.documents(rules.right)
    rows, row_gaps = _cut(q, [document.queries for document in live])
    keys, _ = _cut(k, [document.keys for document in live])
    values, _ = _cut(v, [document.keys for document in live])
    done = [_attend(*x, rules) for x in zip(rows, keys, values, live, strict=True)]
    # masked_fill and not zeros: the result stays a function of q when no row sees a key
    every = torch.ones((), dtype=torch.bool, device=q.device)
    size = v.shape[2]
    zeros = [gap.masked_fill(every, 0.0).sum(2, keepdim=True) for gap in row_gaps]
    out_gaps = [zero.expand(-1, -1, size) for zero in zeros]
    lse_gaps = [zero[..., 0] - math.inf for zero in zeros]
    lse = _join([lse for _, lse in done], lse_gaps).to(statistics_dtype(q.dtype))
    return _join([out for out, _ in done], out_gaps), unseeing_rows(lse, layout.bounds_q[-1], rules)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, document: Document, rules: Rules
) -> tuple[Tensor, Tensor]:
    block = block_of(document, rules._replace(left=len(k)), 0, len(q))
    group = q.shape[1] // k.shape[1]
    k, v = (x[: block.keys].repeat_interleave(group, dim=1) for x in (k, v))
    products = rules.scale * torch.einsum("ihd,jhd->hij", q, k)
    values = scores(products, gain_of(block, rules), block, rules)
    weights, lse = _softmax(values, rules.sinks)
    out = torch.einsum("hij,jhd->ihd", dropped(weights, block, rules), v)
    return out, lse.transpose(0, 1)


def _softmax(values: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    seen = values.shape[-1]
    if sinks is not None:
        sink = sinks.to(values.dtype)[:, None, None].expand(-1, values.shape[1], 1)
        values = torch.cat((values, sink), -1)
    # of a row without a finite score the softmax is 0 / 0
    dead = (values == -math.inf).all(-1, keepdim=True)
    values = values.masked_fill(dead, 0.0)
    weights = values.softmax(-1)[..., :seen].masked_fill(dead, 0.0)
    return weights, values.logsumexp(-1).masked_fill(dead[..., 0], -math.inf)


def _cut(x: Tensor, kept: list[slice]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    # one split: the gradient of a slice is a zero tensor as long as the whole batch
    edges = [0, *(edge for part in kept for edge in (part.start, part.stop)), x.shape[0]]
    pieces = x.split([end - start for start, end in pairwise(edges)])
    return pieces[1::2], pieces[0::2]


def _join(kept: list[Tensor], gaps: list[Tensor]) -> Tensor:
    pieces = gaps[:1]
    for piece, gap in zip(kept, gaps[1:], strict=True):
        pieces += [piece, gap]
    return torch.cat(pieces)
