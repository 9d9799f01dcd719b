"""What attention inside documents is: plain PyTorch, any precision, differentiable twice."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ._documents import documents


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the result (T, H, D) and the log of the softmax denominators (T, H)."""
    live = documents(
        cu_seqlens_q, cu_seqlens_k, tokens_q=q.shape[0], tokens_k=k.shape[0], causal=causal
    )
    rows, row_gaps = _cut(q, [document.queries for document in live])
    keys, _ = _cut(k, [document.keys for document in live])
    values, _ = _cut(v, [document.keys for document in live])
    done = [_attend(*x, causal=causal, scale=scale) for x in zip(rows, keys, values, strict=True)]
    # masked_fill and not zeros: the result stays a function of q when no row sees a key
    every = torch.ones((), dtype=torch.bool, device=q.device)
    out_gaps = [gap.masked_fill(every, 0.0) for gap in row_gaps]
    lse_gaps = [gap.new_full(gap.shape[:2], -math.inf) for gap in row_gaps]
    return _join([out for out, _ in done], out_gaps), _join([lse for _, lse in done], lse_gaps)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = scale * torch.einsum("ihd,jhd->hij", q, k)
    if causal:
        _, len_q, len_k = scores.shape
        future = torch.ones(len_q, len_k, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(future.triu(1 + len_k - len_q), -math.inf)
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
    return out, scores.logsumexp(-1).transpose(0, 1)


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
