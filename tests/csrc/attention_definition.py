"""Packed attention in float64, written out, and calls of the C++ operators."""

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

UNBOUNDED = 2**31 - 1
TRANSFORMS = ("none", "softcap", "softplus", "power")


class Rules(NamedTuple):
    """In the order of the operators' arguments; `transform` by its name."""

    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    gain: Tensor | None = None
    scale: float = 0.3
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    limit: int = UNBOUNDED
    transform: str = "none"
    a: float = 0.0
    b: float = 0.0
    dropout: float = 0.0
    seed: int = 0

    def numbers(self) -> tuple:
        return (*self[3:7], TRANSFORMS.index(self.transform), *self[8:])


class Batch(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None
    lengths: tuple[int, ...]
    lengths_k: tuple[int, ...]


def documents(batch: Batch, right: int) -> Tensor:
    """Return (N', 5): the documents in which a query sees a key, from the first one that does."""
    spans = zip(*(pairwise([0, *accumulate(x)]) for x in batch[-2:]), strict=True)
    found = []
    for n, ((q, q_end), (k, k_end)) in enumerate(spans):
        first = max(q, q_end - (k_end - k) - right)
        if first < q_end and k < k_end:
            found.append((first, q_end, k, k_end, n))
    return torch.tensor(found, dtype=torch.int64).view(-1, 5)


def attention(batch: Batch, rules: Rules) -> dict[str, Tensor]:
    """Return what the operators of the library compute; rows of no document are 0 and -inf."""
    q, k, v, grad_out, grad_lse, *_ = batch
    at = documents(batch, rules.right)
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = torch.full(q.shape[:2], -torch.inf)
    op = torch.ops.apical.varlen_attention_cpu_forward
    op(q, k, v, at, *rules[:3], *rules.numbers(), out, lse)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    gain = None if rules.gain is None else torch.zeros_like(rules.gain)
    op = torch.ops.apical.varlen_attention_cpu_backward
    saved = (grad_out, grad_lse, q, k, v, out, lse, at, rules.alibi_slopes, rules.gain)
    op(*saved, *rules.numbers(), *grads, gain)
    named: dict[str, Tensor] = dict(
        zip(("out", "lse", "q", "k", "v"), (out, lse, *grads), strict=True)
    )
    return named if gain is None else named | {"gain": gain}


def truth(batch: Batch, rules: Rules) -> dict[str, Tensor]:
    """Return the same in float64, by the definition."""
    q, k, v = (x.double().requires_grad_() for x in batch[:3])
    gain = None if rules.gain is None else rules.gain.double().requires_grad_()
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    for doc in documents(batch, rules.right).tolist():
        rows = slice(*doc[:2])
        out[rows], lse[rows] = _document(q, k, v, gain, doc, rules)
    leaves = [q, k, v, *([] if gain is None else [gain])]
    loss = (out * batch.grad_out).sum()
    if batch.grad_lse is not None:
        loss = loss + (lse * batch.grad_lse)[lse.isfinite()].sum()
    grads = torch.autograd.grad(loss, leaves)
    names = ("out", "lse", "q", "k", "v", "gain")
    return dict(zip(names, (out.detach(), lse.detach(), *grads), strict=False))


def _document(
    q: Tensor, k: Tensor, v: Tensor, gain: Tensor | None, doc: list[int], rules: Rules
) -> tuple[Tensor, Tensor]:
    first, end, key, key_end, index = doc
    group = q.shape[1] // k.shape[1]
    keys, values = (x[key:key_end].repeat_interleave(group, 1) for x in (k, v))
    x = rules.scale * torch.einsum("ihd,jhd->hij", q[first:end], keys)
    i, j = (
        torch.arange(end - first)[:, None] + (key_end - key) - (end - first),
        torch.arange(key_end - key),
    )
    seen = (j >= i - rules.left) & (j <= i + rules.right) & (j < rules.limit)
    y, valid = _transformed(x, None if gain is None else gain[first:end].T[..., None], rules)
    if rules.alibi_slopes is not None:
        slopes = rules.alibi_slopes.double()
        y = y - (slopes if slopes.dim() == 1 else slopes[index])[:, None, None] * (i - j).abs()
    valid = valid & seen
    return _softmax(y, valid, values, first, rules)


def _transformed(x: Tensor, gain: Tensor | None, rules: Rules) -> tuple[Tensor, Tensor]:
    everything = torch.ones_like(x, dtype=torch.bool)
    if rules.transform == "softcap":
        return rules.a * torch.tanh(x / rules.a), everything
    if rules.transform == "softplus":
        return torch.nn.functional.softplus(x, threshold=1000).log(), everything
    if rules.transform == "power":
        assert gain is not None
        z = gain * torch.nn.functional.softplus(x, threshold=1000) - rules.b
        return rules.a * z.where(z > 0, 1.0).log(), z > 0
    return x, everything


def _softmax(
    y: Tensor, valid: Tensor, values: Tensor, first: int, rules: Rules
) -> tuple[Tensor, Tensor]:
    # a row without scores must not spoil the gradients of others
    y = y.where(valid, 0.0)
    sinks = None if rules.sinks is None else rules.sinks.double()[:, None, None]
    top = y.detach().where(valid, -torch.inf).amax(-1, keepdim=True)
    top = torch.maximum(top, sinks) if sinks is not None else top.where(top.isfinite(), 0.0)
    weights = (y - top).exp().where(valid, 0.0)
    total = weights.sum(-1, keepdim=True)
    total = total if sinks is None else total + (sinks - top).exp()
    some = total > 0
    total = total.where(some, 1.0)
    if rules.dropout > 0:
        weights = weights * _kept(weights.shape, first, rules) / (1 - rules.dropout)
    out = torch.einsum("hij,jhe->ihe", weights / total, values)
    lse = (total.log() + top).where(some, -torch.inf)
    return out, lse[..., 0].T


def _kept(shape: torch.Size, first: int, rules: Rules) -> Tensor:
    h, i, j = (torch.arange(n) for n in shape)
    i = i + first
    counter = torch.broadcast_tensors(j, i[:, None], h[:, None, None])
    words = philox(counter, rules.seed)
    return words >= int(rules.dropout * 2**32)


def philox(counter: tuple[Tensor, ...], seed: int) -> Tensor:
    """Return the first word of Philox4x32-10 for counters (c0, c1, c2, 0), in int64."""
    low = 2**32 - 1
    c0, c1, c2, c3 = *counter, torch.zeros_like(counter[0])
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        (a, a_low), (b, b_low) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = b ^ c1 ^ k0, b_low, a ^ c3 ^ k1, a_low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    # in halves of 16 bits, because int64 holds no product of two numbers of 32
    low = x & 0xFFFF
    part = low * factor
    high = (x >> 16) * factor + (part >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | part & 0xFFFF
