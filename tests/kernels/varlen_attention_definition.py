"""What packed attention is, written out: one dense softmax under a mask over the whole batch.

Nothing here is the package's but the choice of an implementation, by `force`.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apical.kernels._common import native
from apical.kernels.varlen_attention import _cpu, _split, ops, varlen_attention
from apical.kernels.varlen_attention._rules import UNBOUNDED, Rules

Options = dict[str, Any]
Attention = Callable[..., tuple[Tensor, Tensor]]
Results = dict[str, Tensor]

# one token, around the usual block of 128, and empty documents first, in the middle, last
RAGGED = (0, 1, 127, 0, 128, 129, 0)
# fewer, equal and more keys than queries; none on either side; several blocks of rows
RAGGED_Q = (0, 5, 9, 4, 0, 1, 150, 70)
RAGGED_K = (3, 9, 5, 0, 0, 90, 129, 131)

# the C++ kernel, one document after the other, and its blocks for what torch's kernel cannot do
IMPLEMENTATIONS = ("cpu", "split", "dense")
PLAIN = Rules(None, None, None, None, 1.0, UNBOUNDED, 0, UNBOUNDED, "none", 0.0, 0.0, 0.0)


def force(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have the fused operation use one implementation, or skip where it cannot run."""
    chosen = _split
    if name == "dense":
        monkeypatch.setattr(_split, "_fused_fits", lambda *_: False)
    if name == "cpu":
        sample = torch.zeros(1, 1, 8)
        if not _cpu.takes(sample, sample, PLAIN):
            pytest.skip(f"the C++ kernel takes no call; the library: {native.status()[1]}")
        chosen = _cpu

    def choose(q: Tensor, v: Tensor, rules: Rules) -> Any:
        return chosen if chosen is _split or _cpu.takes(q, v, rules) else _split

    monkeypatch.setattr(ops, "implementation", choose)
    return name


def boundaries(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def inputs(
    tokens_q: int,
    tokens_k: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    values: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Return q, k, v, and gradients of the result and of lse; the same ones for the same sizes."""
    draw = torch.Generator().manual_seed(0)
    size = dim if values is None else values
    shapes = {
        "q": (tokens_q, heads, dim),
        "k": (tokens_k, kv_heads, dim),
        "v": (tokens_k, kv_heads, size),
        "grad": (tokens_q, heads, size),
        "grad_lse": (tokens_q, heads),
    }
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def packed(lengths_q: Sequence[int], lengths_k: Sequence[int], **fixed: Any) -> Attention:
    """Return what is tested, with lse."""
    cu = boundaries(lengths_q), boundaries(lengths_k)
    return lambda q, k, v, **options: varlen_attention(
        q, k, v, *cu, **fixed, **options, return_lse=True
    )


def defined(lengths_q: Sequence[int], lengths_k: Sequence[int]) -> Attention:
    """Return the definition, with the options of `varlen_attention`."""
    return lambda q, k, v, **options: _define(q, k, v, lengths_q, lengths_k, **options)


def torchs(lengths_q: Sequence[int], lengths_k: Sequence[int]) -> Attention:
    """Return torch's own attention under the mask of the whole batch, without lse.

    It has a backward of the same kind, which keeps lse and not the weights.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        document, distance, _ = places(lengths_q, lengths_k, (q.shape[0], k.shape[0]))
        seen = (document >= 0) & (distance >= 0) if causal else document >= 0
        alive = seen.any(1, keepdim=True)
        size, scale, values = max(q.shape[2], v.shape[2]), q.shape[2] ** -0.5, v.shape[2]
        # its fused kernel takes values of the size of keys
        padded = (torch.nn.functional.pad(x, (0, size - x.shape[2])) for x in (q, k, v))
        query, key, value = (x.transpose(0, 1)[None] for x in padded)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen | ~alive, enable_gqa=True, scale=scale
        )
        out = out[0].masked_fill(~alive, 0.0).transpose(0, 1)[..., :values]
        return out, out.new_zeros(q.shape[:2])

    return attend


def run(
    attend: Attention,
    tensors: dict[str, Tensor],
    options: Options,
    dtype: torch.dtype | None = None,
    *,
    with_lse: bool = True,
) -> Results:
    """Return the result, lse (0 for -inf) and every gradient; all in a dtype if one is given."""
    dtype = dtype or tensors["q"].dtype
    leaves = {name: tensors[name].detach().to(dtype).requires_grad_() for name in "qkv"}
    given = dict(options)
    for name in ("sinks", "q_global", "k_global", "alibi_slopes"):
        if isinstance(given.get(name), Tensor):
            # slopes and sinks are float32 whatever q is
            wide = name in ("sinks", "alibi_slopes") and dtype != torch.float64
            given[name] = given[name].detach().to(torch.float32 if wide else dtype)
            if name != "alibi_slopes":
                leaves[name] = given[name] = given[name].requires_grad_()
    out, lse = attend(leaves["q"], leaves["k"], leaves["v"], **given)
    blind = lse == -math.inf
    results, grads = [out], [tensors["grad"].to(out.dtype)]
    if with_lse:
        # of a row that sees no key, lse is a constant
        results, grads = [out, lse], [*grads, tensors["grad_lse"].to(lse.dtype)]
        grads[1] = grads[1].masked_fill(blind, 0.0)
    # keys and values of no document are no part of the reference's graph
    found = torch.autograd.grad(results, list(leaves.values()), grads, materialize_grads=True)
    named = {f"{name}.grad": grad for name, grad in zip(leaves, found, strict=True)}
    finite = lse.detach().masked_fill(blind, 0.0)
    return {"out": out.detach(), "lse": finite, "blind": blind.to(dtype), **named}


def check_all(
    check_error: Callable[[Tensor, Tensor, Tensor, str], None],
    actual: Results,
    exact: Results,
    plain: Results,
) -> None:
    """Assert that every result is as good as plain PyTorch's."""
    assert actual.keys() == exact.keys() == plain.keys()
    for name, value in actual.items():
        # plain lse of half precision is half precision
        three = [value, exact[name], plain[name].to(value.dtype)]
        if name == "sinks.grad":
            # of a sum over all tokens, which cancels, one rounding is one of its usual size
            usual = float(actual["lse"].shape[0]) ** 0.5
            three = [torch.cat((x, x.new_full((1,), usual))) for x in three]
        check_error(three[0], three[1], three[2], name)


def with_blocks(
    implementation: str, attend: Attention, tensors: dict[str, Tensor], options: Options,
    exact: Results, plain: Results, *, with_lse: bool = True,
) -> Results:  # fmt: skip
    """Return plain PyTorch's results, each of the less exact of two ways for the C++ kernel.

    The second way is that of the kernel, in PyTorch: weights from lse, sums in blocks. The errors
    of one formula are a few roundings, and luck.
    """
    if implementation != "cpu":
        return plain
    with pytest.MonkeyPatch.context() as patch:
        force("dense", patch)
        blocks = run(attend, tensors, options, with_lse=with_lse)

    def error(x: Tensor, name: str) -> float:
        return float((x - exact[name]).abs().max()) if x.numel() else 0.0

    return {name: max(plain[name], blocks[name], key=lambda x: error(x, name)) for name in exact}


def assert_same_bits(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def places(
    lengths_q: Sequence[int], lengths_k: Sequence[int], tokens: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, by query and key: the document both are of or -1, the distance, the key's place."""
    document = torch.full(tokens, -1)
    distance, place = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens).long()
    row = column = 0
    for n, (len_q, len_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        block = slice(row, row + len_q), slice(column, column + len_k)
        query, key = torch.arange(len_q)[:, None] + (len_k - len_q), torch.arange(len_k)
        document[block], distance[block], place[block] = n, query - key, key.expand(len_q, len_k)
        row, column = row + len_q, column + len_k
    return document, distance, place


def _define(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    global_tokens: int = 0,
    q_global: Tensor | None = None,
    k_global: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    document, distance, place = places(lengths_q, lengths_k, (q.shape[0], k.shape[0]))
    left, right = (10**9 if side < 0 else side for side in window_size)
    near = (document >= 0) & (distance <= left) & (distance >= (0 if causal else -right))
    far = (document >= 0) & (distance > left) & (place < global_tokens)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = products(q, k) * scale
    if q_global is not None or k_global is not None:
        # two branches of scores, and every key of the second at the same distance
        second = products(q if q_global is None else q_global, k if k_global is None else k_global)
        scores = torch.where(far, second * scale, scores)
        distance = torch.where(far, left + 1, distance)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.expand(max(len(lengths_q), 1), -1)[document].permute(2, 0, 1)
        scores = scores - slopes.to(scores.dtype) * distance.abs()
    in_documents = torch.arange(q.shape[0])[:, None] < sum(lengths_q)
    weights, lse = _softmax(scores.masked_fill(~(near | far), -math.inf), sinks, in_documents)
    if dropout_p:
        assert dropout_seed is not None
        seen = kept(int(dropout_seed), dropout_p, place, heads=q.shape[1])
        weights = weights * seen / (1 - dropout_p)
    return weighted(weights, v), lse


def _softmax(scores: Tensor, sinks: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    keys = scores.shape[-1]
    if sinks is not None:
        # a key that every query of a document sees, and that has no value
        extra = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat((scores, extra.masked_fill(~rows, -math.inf)), -1)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(dead, 0.0)
    weights = scores.softmax(-1).masked_fill(dead, 0.0)[..., :keys]
    return weights, scores.logsumexp(-1).masked_fill(dead[..., 0], -math.inf).T


def products(q: Tensor, k: Tensor) -> Tensor:
    """Return (H, T, S)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return q.transpose(0, 1) @ k.transpose(0, 1).mT


def weighted(weights: Tensor, v: Tensor) -> Tensor:
    """Return (T, H, E)."""
    v = v.repeat_interleave(weights.shape[0] // v.shape[1], 1)
    return (weights.to(v.dtype) @ v.transpose(0, 1)).transpose(0, 1)


def philox(key: tuple[Any, Any], counter: Sequence[Any]) -> list[np.ndarray]:
    """Return the four words of Philox4x32-10, in numpy's unsigned integers."""
    half, word = np.uint64(32), np.uint64(0xFFFFFFFF)
    c = list(np.broadcast_arrays(*(np.asarray(x, dtype=np.uint64) & word for x in counter)))
    k0, k1 = (np.uint64(x) for x in key)
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(second >> half) ^ c[1] ^ k0, second & word, (first >> half) ^ c[3] ^ k1, first & word]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & word, (k1 + np.uint64(0xBB67AE85)) & word
    return c


def kept(seed: int, rate: float, place: Tensor, *, heads: int) -> Tensor:
    """Return which weights (H, T, S) dropout keeps; place (T, S) of the keys in their documents."""
    rows = np.arange(place.shape[0])[None, :, None]
    head, keys = np.arange(heads)[:, None, None], place.numpy()[None]
    words = philox((seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF), (keys, rows, head, 0))
    return torch.from_numpy(words[0] >= np.uint64(int(rate * 2**32)))
