"""The Triton backward kernels under the interpreter, against derivatives of the definition."""

import math
import mmap
import os
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

from apical.kernels.varlen_attention import _reference, _split, _triton_backward
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

# more queries than keys and fewer, one token, none on either side; the last has tiles of 128 keys
QUERIES, KEYS = (5, 0, 70, 1, 3, 20), (5, 3, 40, 1, 0, 260)
HEADS, KEY_HEADS = 4, 2
PLAIN = Rules(None, None, None, None, 0.3, UNBOUNDED, UNBOUNDED, UNBOUNDED, "none", 0.0, 0.0, 0.0)
CAUSAL = PLAIN._replace(right=0)
NAMES = ("dq", "dk", "dv", "dgain")
Batch = dict[str, Tensor]
Gradients = dict[str, Tensor]


@pytest.fixture(params=["pointer", "tma"])
def wide_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large blocks, of which the interpreter needs fewer, in both ways to load."""

    def choose(large: str) -> Callable[..., list[Configuration]]:
        def only(major: int, rows: int, *_: int, tma: bool, **__: bool) -> list[Configuration]:
            tma = tma and request.param == "tma"
            blocks = {"queries": 64, "keys": 64, large: rows}
            return [Configuration(tma, tma, **blocks, warps=4, stages=2)]

        return only

    monkeypatch.setattr(_triton_backward, "configurations_keys", choose("keys"))
    monkeypatch.setattr(_triton_backward, "configurations_queries", choose("queries"))


def batch(
    queries: tuple[int, ...] = QUERIES,
    keys: tuple[int, ...] = KEYS,
    *,
    heads: tuple[int, int] = (HEADS, KEY_HEADS),
    # no powers of 2; D of 24 leaves most of the last block out
    sizes: tuple[int, int] = (24, 40),
    after: int = 3,
    dtype: torch.dtype = torch.float32,
) -> tuple[Batch, PackedLayout]:
    """Return tensors with `after` tokens of nan behind the last boundary, and the layout."""
    tokens, tokens_k = sum(queries), sum(keys)
    shapes = {
        "q": (tokens, heads[0], sizes[0]),
        "k": (tokens_k, heads[1], sizes[0]),
        "v": (tokens_k, heads[1], sizes[1]),
        "grad_out": (tokens, heads[0], sizes[1]),
        "grad_lse": (tokens, heads[0]),
    }
    draw = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    draw["grad_lse"] = draw["grad_lse"].float()
    slack = {name: x.new_full((after, *x.shape[1:]), math.nan) for name, x in draw.items()}
    joined = {name: torch.cat((x, slack[name])) for name, x in draw.items()}
    return joined, PackedLayout.from_lengths(queries, keys)


def definition(
    tensors: Batch, layout: PackedLayout, rules: Rules, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], Gradients]:
    """Return result and lse, and the gradients that autograd finds, in one precision."""
    q, k, v = (tensors[name].to(dtype).requires_grad_() for name in "qkv")
    leaves = [q, k, v]
    if rules.gain is not None:
        leaves.append(rules.gain.to(dtype).requires_grad_())
        rules = rules._replace(gain=leaves[3])
    out, lse = _reference.forward(q, k, v, layout, rules)
    # lse of a row that sees no key is a constant
    given = tensors["grad_lse"].to(lse.dtype).masked_fill(lse == -math.inf, 0.0)
    # if no row sees a key, lse is a constant altogether
    results = (out, lse) if lse.requires_grad else (out,)
    grads = (tensors["grad_out"].to(out.dtype), given)[: len(results)]
    found = torch.autograd.grad(results, leaves, grads, materialize_grads=True)
    return (out.detach(), lse.detach()), dict(zip(NAMES, found, strict=False))


def derive(
    tensors: Batch,
    layout: PackedLayout,
    rules: Rules,
    saved: tuple[Tensor, Tensor],
    by: ModuleType = _triton_backward,
) -> Gradients:
    """Return the gradients that an implementation finds, the kernels by default."""
    out, lse = saved[0].to(tensors["q"].dtype), saved[1].float()
    named = {name: tensors[name] for name in ("grad_out", "grad_lse", "q", "k", "v")}
    found = by.backward(**named, out=out, lse=lse, layout=layout, rules=rules)
    return {name: x for name, x in zip(NAMES, found, strict=True) if x is not None}


def check(
    tensors: Batch, layout: PackedLayout, rules: Rules, check_error: Callable[..., None]
) -> None:
    """Hold every gradient against float64."""
    saved, exact = definition(tensors, layout, rules, torch.float64)
    actual = derive(tensors, layout, rules, saved)
    if tensors["q"].dtype == torch.float32:
        # autograd knows all weights; from the result and lse alone, a row of one key is less exact
        plain = derive(tensors, layout, rules, saved, by=_split)
    else:
        _, plain = definition(tensors, layout, rules, tensors["q"].dtype)
    assert actual.keys() == exact.keys() == plain.keys()
    for name, value in actual.items():
        check_error(value, exact[name], plain[name].to(value.dtype), name)


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
        rules = rules._replace(gain=torch.rand(len(tensors["q"]), HEADS) * 2)
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
        # rows past a document's end, at a distance of 260 and with a score of 0, overflow
        {"alibi_slopes": torch.tensor([-0.5, -0.25, 0.0, -1.0])},
        # they enter through lse alone
        {"sinks": torch.tensor([0.0, 5.0, -5.0, -math.inf])},
        # the highest bit of the seed and of the threshold are set
        {"seed": torch.tensor([-5]), "dropout": 0.9},
    ],
    ids=["alibi", "alibi-that-grows", "sinks", "dropout"],
)
def test_extras(extra: dict[str, Tensor | float], check_error: Callable[..., None]):
    check(*batch(), PLAIN._replace(**extra), check_error)


@pytest.mark.usefixtures("wide_blocks")
@pytest.mark.parametrize(
    ("heads", "sizes"),
    [
        pytest.param((3, 3), (16, 16), id="no-groups"),
        # all heads in one loop
        pytest.param((3, 1), (32, 16), id="one-key-head"),
        # no descriptor addresses rows of 5, and one column is less than a matrix unit takes
        pytest.param((2, 1), (5, 1), id="odd"),
        pytest.param((2, 2), (16, 0), id="lse-alone"),
    ],
)
def test_heads(heads: tuple[int, int], sizes: tuple[int, int], check_error: Callable[..., None]):
    tensors, layout = batch(heads=heads, sizes=sizes)
    check(tensors, layout, CAUSAL, check_error)


@pytest.mark.usefixtures("wide_blocks")
def test_half_precision(check_error: Callable[..., None]):
    # not bfloat16: the interpreter multiplies its bits as integers (Triton 3.6 and 3.9)
    check(*batch(dtype=torch.float16), CAUSAL, check_error)


@pytest.mark.usefixtures("wide_blocks")
def test_gradients_in_any_form():
    tensors, layout = batch(QUERIES[:5], KEYS[:5])
    saved, _ = definition(tensors, layout, CAUSAL, torch.float64)
    no_lse = {**tensors, "grad_lse": torch.zeros_like(tensors["grad_lse"])}
    none = {**tensors, "grad_lse": None}
    same(derive(none, layout, CAUSAL, saved), derive(no_lse, layout, CAUSAL, saved))
    # as of a sum: one number; as of a sum over tokens or heads: strides of 0; every second channel
    grad = torch.randn(HEADS, 40)
    for given in (
        torch.ones(()).expand_as(tensors["grad_out"]),
        grad.expand_as(tensors["grad_out"]),
        grad[:1].expand_as(tensors["grad_out"]),
        grad.repeat_interleave(2, 1)[:, ::2].expand_as(tensors["grad_out"]),
    ):
        assert not given.is_contiguous()
        strided, dense = ({**tensors, "grad_out": x} for x in (given, given.contiguous()))
        same(derive(strided, layout, CAUSAL, saved), derive(dense, layout, CAUSAL, saved))


@pytest.mark.usefixtures("wide_blocks")
def test_any_strides():
    tensors, layout = batch(QUERIES[:5], KEYS[:5])
    saved, _ = definition(tensors, layout, CAUSAL, torch.float64)
    expected = derive(tensors, layout, CAUSAL, saved)
    # parts of one projection; heads before tokens; every second channel
    fused = torch.cat([tensors["k"], tensors["k"], tensors["v"]], 2)[:, :, 24:]
    k, v = fused.split([24, 40], 2)
    q = tensors["q"].transpose(0, 1).contiguous().transpose(0, 1)
    same(derive({**tensors, "q": q, "k": k, "v": v}, layout, CAUSAL, saved), expected)
    apart = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in tensors.items()}
    out, lse = (x.repeat_interleave(2, -1)[..., ::2] for x in saved)
    same(derive(apart, layout, CAUSAL, (out, lse)), expected)


@pytest.mark.usefixtures("wide_blocks")
# of the poisoned documents themselves
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_document_is_the_same_alone_and_in_any_company():
    tensors, layout = batch()
    rules = PLAIN._replace(left=30, right=7, sinks=torch.randn(HEADS))
    saved, _ = definition(tensors, layout, rules, torch.float64)
    expected = derive(tensors, layout, rules, saved)
    spans = list(zip(pairwise(layout.bounds_q), pairwise(layout.bounds_k), strict=True))
    # 0 * nan would show
    for span in spans:
        own = {name: slice(*span[name in ("k", "v")]) for name in tensors}
        bad = {name: poisoned(x, own[name]) for name, x in tensors.items()}
        again = derive(
            bad, layout, rules, (poisoned(saved[0], own["q"]), poisoned(saved[1], own["q"]))
        )
        for name, part in (("dq", own["q"]), ("dk", own["k"]), ("dv", own["v"])):
            assert torch.equal(again[name][part], expected[name][part]), name
            # nothing lies behind the last boundary
            assert not again[name][-3:].any(), name
        alone = derive(
            {name: x[own[name]] for name, x in tensors.items()},
            PackedLayout.from_lengths([span[0][1] - span[0][0]], [span[1][1] - span[1][0]]),
            rules,
            (saved[0][own["q"]], saved[1][own["q"]]),
        )
        for name, part in (("dq", own["q"]), ("dk", own["k"]), ("dv", own["v"])):
            assert torch.equal(alone[name], expected[name][part]), name


def poisoned(x: Tensor, own: slice) -> Tensor:
    """Return x with nan around its own rows, and infinity right behind them."""
    bad = torch.full_like(x, math.nan)
    bad[own] = x[own]
    bad[own.stop : own.stop + 1].fill_(math.inf)
    return bad


@pytest.mark.usefixtures("wide_blocks")
def test_the_order_of_documents_does_not_matter():
    tensors, layout = batch(after=0)
    saved, _ = definition(tensors, layout, CAUSAL, torch.float64)
    expected = derive(tensors, layout, CAUSAL, saved)
    order = [3, 0, 5, 1, 4, 2]
    spans = [list(pairwise(layout.bounds_q)), list(pairwise(layout.bounds_k))]

    def swap(x: Tensor, name: str) -> Tensor:
        return torch.cat([x[slice(*spans[name in ("k", "v", "dk", "dv")][n])] for n in order])

    swapped = PackedLayout.from_lengths([QUERIES[n] for n in order], [KEYS[n] for n in order])
    again = derive(
        {name: swap(x, name) for name, x in tensors.items()},
        swapped,
        CAUSAL,
        (swap(saved[0], "q"), swap(saved[1], "q")),
    )
    same(again, {name: swap(x, name) for name, x in expected.items()})


@pytest.mark.usefixtures("wide_blocks")
def test_offsets_beyond_32_bits():
    # 2.1e9 elements of memory that is asked for and, but for a few pages, never touched
    far = 2**30 + 64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * far + 64), flags=flags), dtype=torch.float16)
    near, lse = torch.randn(3, 3, 16).half(), torch.randn(3, 3).abs() + 3.0
    # one document and three, so that rows and the first row of a document lie far off
    for lengths in ((3,), (1, 1, 1)):
        layout = PackedLayout.from_lengths(lengths)
        names = ("q", "k", "v", "grad_out")
        dense = {**dict.fromkeys(names, near), "grad_lse": lse}
        expected = derive(dense, layout, CAUSAL, (near, lse))
        for strides in ((far, 16, 1), (16, far, 1)):
            x = memory.as_strided((3, 3, 16), strides).copy_(near)
            again = {**dict.fromkeys(names, x), "grad_lse": lse}
            same(derive(again, layout, CAUSAL, (x, lse)), expected)


def test_the_table_as_it_is(check_error: Callable[..., None]):
    # tiles of the list that are cut into parts: float32 has blocks of a part of their rows
    tensors, layout = batch((140, 70), (300, 60), heads=(2, 1))
    check(tensors, layout, CAUSAL, check_error)


@pytest.mark.usefixtures("wide_blocks")
def test_a_row_without_keys_ignores_the_gradient_of_its_lse():
    # -inf is a constant, and the gradient of what is made of it often nan
    tensors, layout = batch((5, 3), (2, 0))
    saved, _ = definition(tensors, layout, CAUSAL, torch.float64)
    blind = saved[1] == -math.inf
    assert blind[:8].any()
    expected = derive(tensors, layout, CAUSAL, saved)
    given = tensors["grad_lse"].masked_fill(blind, math.nan)
    same(derive({**tensors, "grad_lse": given}, layout, CAUSAL, saved), expected)
    assert not expected["dq"][blind[:, 0]].any()


def test_no_tokens():
    tensors, layout = batch((), (), after=0)
    found = derive(tensors, layout, CAUSAL, (tensors["grad_out"], tensors["grad_lse"]))
    assert {name: x.shape[0] for name, x in found.items()} == {"dq": 0, "dk": 0, "dv": 0}


def same(actual: Gradients, expected: Gradients) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name
