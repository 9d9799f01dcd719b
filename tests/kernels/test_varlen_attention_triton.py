"""The Triton forward kernel under the interpreter, against the definition in float64."""

import math
import mmap
import os
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from apical.kernels._common.triton_tiles import fits_tma
from apical.kernels.varlen_attention import _triton, _triton_forward
from apical.kernels.varlen_attention._layout import PackedLayout
from apical.kernels.varlen_attention._rules import UNBOUNDED, Rules
from apical.kernels.varlen_attention._triton_launch import Configuration

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
    ),
    # one block of 64 x 64 per product: threads only wait for each other
    pytest.mark.usefixtures("one_thread"),
]

# more queries than keys and fewer, one token, none on either side, beyond one tile; the last is
# long enough for the wide tiles
QUERIES, KEYS = (5, 0, 70, 1, 3, 20), (5, 3, 40, 1, 0, 260)
HEADS, KEY_HEADS = 4, 2
PLAIN = Rules(None, None, None, None, 0.3, UNBOUNDED, UNBOUNDED, UNBOUNDED, "none", 0.0, 0.0, 0.0)
CAUSAL = PLAIN._replace(right=0)
Tensors = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(params=["pointer", "tma"])
def wide_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large blocks, of which the interpreter needs fewer, in both ways to load."""

    def only(major: int, rows: int, *_: int, tma: bool, **__: bool) -> list[Configuration]:
        tma = tma and request.param == "tma"
        return [Configuration(tma, tma, rows, 64, 4, 2)]

    monkeypatch.setattr(_triton_forward, "configurations", only)


def batch(
    queries: tuple[int, ...] = QUERIES,
    keys: tuple[int, ...] = KEYS,
    *,
    after: int = 3,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensors, PackedLayout]:
    """Return q, k, v with `after` tokens after the last boundary, and the layout."""
    # head sizes that are no powers of 2; D of 24 leaves most of the last block out
    shapes = (sum(queries), HEADS, 24), (sum(keys), KEY_HEADS, 24), (sum(keys), KEY_HEADS, 40)
    q, k, v = (torch.randn(shape[0] + after, *shape[1:], dtype=dtype) for shape in shapes)
    return (q, k, v), PackedLayout.from_lengths(queries, keys)


def philox(seed: int, counter: list[np.ndarray]) -> np.ndarray:
    """Return the first word of Philox4x32-10 (Salmon et al. 2011), as the paper states it."""
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    c = [word.astype(np.uint64) & 0xFFFFFFFF for word in counter]
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(second >> 32) ^ c[1] ^ key[0], second, (first >> 32) ^ c[3] ^ key[1], first]
        c = [word & 0xFFFFFFFF for word in c]
        key = [
            word + np.uint64(step) & 0xFFFFFFFF
            for word, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)
        ]
    return c[0]


def kept(rules: Rules, rows: range, keys: int) -> Tensor:
    """Return which weights dropout keeps, (H, I, J)."""
    assert rules.seed is not None
    grid = np.meshgrid(np.arange(HEADS), np.array(rows), np.arange(keys), indexing="ij")
    words = philox(int(rules.seed), [grid[2], grid[1], grid[0], np.zeros_like(grid[0])])
    return torch.from_numpy(words >= int(rules.dropout * 2**32))


def transformed(x: Tensor, gain: Tensor | None, rules: Rules) -> Tensor:
    """Return y(x), (H, I, J), as the README defines it."""
    if rules.transform == "none":
        return x
    if rules.transform == "softcap":
        return rules.a * (x / rules.a).tanh()
    softplus = torch.logaddexp(x, torch.zeros_like(x))
    if rules.transform == "softplus":
        return softplus.log()
    assert gain is not None
    return rules.a * (gain.T[:, :, None].to(x.dtype) * softplus - rules.b).relu().log()


def definition(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, rules: Rules, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the result and lse, document after document, in one precision."""
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=dtype)
    lse = torch.full(q.shape[:2], -math.inf, dtype=dtype)
    spans = zip(pairwise(layout.bounds_q), pairwise(layout.bounds_k), strict=True)
    for n, (rows, keys) in enumerate(spans):
        i, j = slice(*rows), slice(*keys)
        gain = None if rules.gain is None else rules.gain[i]
        group = q.shape[1] // k.shape[1]
        b_k, b_v = (x[j].to(dtype).repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[i].to(dtype), b_k) * rules.scale
        scores = transformed(scores, gain, rules)
        key = torch.arange(len(b_k))
        place = torch.arange(len(scores[0]))[:, None] + len(b_k) - len(scores[0])
        if rules.alibi_slopes is not None:
            slopes = rules.alibi_slopes[n] if rules.alibi_slopes.ndim == 2 else rules.alibi_slopes
            scores = scores - slopes[:, None, None].to(dtype) * (place - key).abs()
        seen = (key >= place - rules.left) & (key <= place + rules.right) & (key < rules.limit)
        scores = scores.masked_fill(~seen, -math.inf)
        sink = torch.full((q.shape[1],), -math.inf) if rules.sinks is None else rules.sinks
        both = torch.cat([scores, sink[:, None, None].to(dtype).expand(-1, len(place), 1)], 2)
        lse[i] = both.logsumexp(2).T
        weights = (scores - both.logsumexp(2)[:, :, None]).exp().nan_to_num(0.0)
        if rules.seed is not None:
            weights = weights * kept(rules, range(*rows), len(b_k)) / (1.0 - rules.dropout)
        out[i] = torch.einsum("hij,jhe->ihe", weights, b_v)
    return out, lse


def check(
    tensors: Tensors, layout: PackedLayout, rules: Rules, check_error: Callable[..., None]
) -> None:
    """Hold result and lse against float64."""
    actual = _triton_forward.forward(*tensors, layout, rules)
    exact = definition(*tensors, layout, rules, torch.float64)
    check_error(actual[0], exact[0], definition(*tensors, layout, rules, actual[0].dtype)[0], "out")
    plain = definition(*tensors, layout, rules, torch.float32)
    none = exact[1].isinf()
    assert torch.equal(none, actual[1] == -math.inf), "rows without keys"
    lses = (x.masked_fill(none, 0.0) for x in (actual[1], exact[1], plain[1]))
    check_error(*lses, "lse")


def test_this_philox_is_the_published_one():
    # known answer of the authors' library: all zeros
    zeros = [np.zeros(1, np.uint64)] * 4
    assert philox(0, zeros)[0] == 0x6627E8D5


@pytest.mark.usefixtures("wide_blocks")
@pytest.mark.parametrize(
    "rules",
    [
        pytest.param(PLAIN, id="full"),
        pytest.param(CAUSAL, id="causal"),
        # begins between two blocks
        pytest.param(PLAIN._replace(left=30, right=7), id="window"),
        pytest.param(PLAIN._replace(left=0, right=0), id="self"),
        # the global half of a Lambda mask: the first rows see nothing
        pytest.param(PLAIN._replace(right=-9, limit=4), id="far-keys"),
        # sums with these must not wrap
        pytest.param(PLAIN._replace(right=-(2**31)), id="nothing"),
        pytest.param(
            PLAIN._replace(left=UNBOUNDED - 1, right=UNBOUNDED - 1), id="almost-unbounded"
        ),
        # the largest score is then that of the smallest product
        pytest.param(CAUSAL._replace(scale=-0.3), id="negative-scale"),
    ],
)
def test_masks(rules: Rules, check_error: Callable[..., None]):
    check(*batch(), rules, check_error)


@pytest.mark.usefixtures("wide_blocks")
@pytest.mark.parametrize("transform", ["none", "softcap", "softplus", "power"])
def test_scores(transform: str, check_error: Callable[..., None]):
    tensors, layout = batch()
    rules = CAUSAL._replace(transform=transform, a=3.0, b=0.5)
    if transform == "power":
        # some rows see keys and still have no finite score
        rules = rules._replace(gain=torch.rand(len(tensors[0]), HEADS) * 2)
    check(tensors, layout, rules, check_error)
    # everything at once, where each is on its way to the next
    slopes, sinks = torch.rand(len(QUERIES), HEADS), torch.randn(HEADS)
    seed = torch.tensor([2**40 + 123])
    rules = rules._replace(alibi_slopes=slopes, sinks=sinks, seed=seed, dropout=0.3)
    check(tensors, layout, rules, check_error)


@pytest.mark.usefixtures("wide_blocks")
@pytest.mark.parametrize(
    "extra",
    [
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.0, 1.0])},
        {"sinks": torch.tensor([0.0, 5.0, -5.0, -math.inf])},
        # the highest bit of the seed and of the threshold are set
        {"seed": torch.tensor([-5]), "dropout": 0.9},
    ],
    ids=["alibi", "sinks", "dropout"],
)
def test_extras(extra: dict[str, Tensor | float], check_error: Callable[..., None]):
    check(*batch(), PLAIN._replace(**extra), check_error)


@pytest.mark.usefixtures("wide_blocks")
def test_half_precision(check_error: Callable[..., None]):
    # not bfloat16: the interpreter multiplies its bits as integers (Triton 3.6 and 3.9)
    check(*batch(dtype=torch.float16), CAUSAL, check_error)


@pytest.mark.usefixtures("wide_blocks")
def test_lse_alone_and_no_tokens():
    (q, k, v), layout = batch()
    out, lse = _triton_forward.forward(q, k, v[:, :, :0], layout, CAUSAL)
    assert out.shape == (len(q), HEADS, 0)
    assert torch.equal(lse, _triton_forward.forward(q, k, v, layout, CAUSAL)[1])
    out, _ = _triton_forward.forward(q[:0], k[:0], v[:0], PackedLayout.from_lengths([]), CAUSAL)
    assert out.shape == (0, HEADS, v.shape[2])


@pytest.mark.usefixtures("wide_blocks")
# of the poisoned documents themselves
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_document_is_the_same_alone_and_in_any_company():
    (q, k, v), layout = batch()
    rules = PLAIN._replace(left=30, right=7, sinks=torch.randn(HEADS))
    out, lse = _triton_forward.forward(q, k, v, layout, rules)
    spans = list(zip(pairwise(layout.bounds_q), pairwise(layout.bounds_k), strict=True))
    # 0 * nan, or a maximum over a neighbour, would show
    for rows, keys in ((slice(*x), slice(*y)) for x, y in spans):
        bad_q, bad_k, bad_v = (torch.full_like(x, math.nan) for x in (q, k, v))
        both = ((q, bad_q, rows), (k, bad_k, keys), (v, bad_v, keys))
        for x, bad, own in both:
            bad[own] = x[own]
            bad[own.stop : own.stop + 1].fill_(math.inf)
        again = _triton_forward.forward(bad_q, bad_k, bad_v, layout, rules)
        assert torch.equal(again[0][rows], out[rows])
        assert torch.equal(again[1][rows], lse[rows])
        # nothing lies behind the last boundary
        assert not again[0][layout.bounds_q[-1] :].any()
    order = [3, 0, 5, 1, 4, 2]
    (q, k, v), swapped = (
        [
            torch.cat([x[slice(*spans[n][side])] for n in order])
            for x, side in ((q, 0), (k, 1), (v, 1))
        ],
        PackedLayout.from_lengths([QUERIES[n] for n in order], [KEYS[n] for n in order]),
    )
    again, _ = _triton_forward.forward(q, k, v, swapped, rules)
    assert torch.equal(again, torch.cat([out[slice(*spans[n][0])] for n in order]))


@pytest.mark.usefixtures("wide_blocks")
def test_any_strides():
    (q, k, v), layout = batch()
    out, lse = _triton_forward.forward(q, k, v, layout, CAUSAL)
    # parts of one projection; heads before tokens; every second channel
    fused = torch.cat([k, k, v], 2)[:, :, 24:]
    parts = q.transpose(0, 1).contiguous().transpose(0, 1), *fused.split([24, 40], 2)
    for x, y, z in (parts, [x.repeat_interleave(2, 2)[:, :, ::2] for x in (q, k, v)]):
        assert not any(one.is_contiguous() for one in (x, y, z))
        again = _triton_forward.forward(x, y, z, layout, CAUSAL)
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)


@pytest.mark.usefixtures("wide_blocks")
def test_offsets_beyond_32_bits():
    # 2.1e9 elements of memory that is asked for and, but for a few pages, never touched
    far = 2**30 + 64
    size = 2 * (2 * far + 64)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.float16)
    near = torch.randn(3, 3, 16).half()
    # one document and three, so that rows and the first row of a document lie far off
    for lengths in ((3,), (1, 1, 1)):
        layout = PackedLayout.from_lengths(lengths)
        expected, _ = _triton_forward.forward(near, near, near, layout, CAUSAL)
        for strides in ((far, 16, 1), (16, far, 1)):
            x = memory.as_strided((3, 3, 16), strides).copy_(near)
            assert torch.equal(_triton_forward.forward(x, x, x, layout, CAUSAL)[0], expected)


def test_what_descriptors_address():
    x = torch.empty(4, 2, 64, dtype=torch.bfloat16)
    assert fits_tma(x)
    assert fits_tma(x[:, :, 8:20])
    # 16 bytes are 8 elements
    assert not fits_tma(x[:, :, 4:])
    assert not fits_tma(torch.empty(4, 2, 20, dtype=torch.bfloat16))
    # the same token over and over
    assert not fits_tma(x[:1].expand(4, -1, -1))


def test_the_table_as_it_is(check_error: Callable[..., None]):
    # tiles of the list that are cut into parts: float32 has blocks of half their rows
    (q, k, v), layout = batch((140,), (300,), after=0)
    check((q[:, :1], k[:, :1], v[:, :1]), layout, CAUSAL, check_error)


def test_calls_that_are_left_to_others():
    q = torch.empty(1, 1, 8)
    # neither float64 nor tensors on the CPU, not even here
    assert not _triton.takes(q, q, PLAIN)
    assert not _triton.takes(q.double(), q.double(), PLAIN)
