"""Layouts of packed batches: documents, tiles, and the cache that spares layers the reading."""

import gc
import weakref
from itertools import accumulate

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from apical.kernels.varlen_attention import PackedLayout, _layout, varlen_attention
from apical.kernels.varlen_attention._layout import layout_of
from apical.kernels.varlen_attention._rules import UNBOUNDED
from apical.kernels.varlen_attention._tiles import tiles_of

from . import varlen_attention_definition as spec

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700)), max_size=8)
SETTINGS = hypothesis.settings(deadline=None, max_examples=60, derandomize=True, database=None)


def bounds_of(lengths: list[int]) -> list[int]:
    return [0, *accumulate(lengths)]


@SETTINGS
@hypothesis.given(lengths=LENGTHS, side=st.sampled_from("qk"), causal=st.booleans())
def test_every_row_is_in_one_tile(lengths, side, causal):
    both = [[pair[n] for pair in lengths] for n in (0, 1)]
    found = tiles_of(*map(bounds_of, both), side=side, causal=causal)
    counts = [torch.zeros(pair["qk".index(side)], dtype=torch.int64) for pair in lengths]
    for tiles in found:
        assert len(tiles.where) > 0
        for document, first in tiles.where.tolist():
            counts[document][first : first + tiles.rows] += 1
            # small tiles for documents of at most 256 queries and keys
            assert tiles.rows == (64 if max(lengths[document]) <= 256 else 128)
    assert all(bool((count == 1).all()) for count in counts)
    assert [tiles.rows for tiles in found] == sorted({tiles.rows for tiles in found})


@SETTINGS
@hypothesis.given(lengths=LENGTHS, side=st.sampled_from("qk"), causal=st.booleans())
def test_tiles_with_most_work_come_first(lengths, side, causal):
    both = [[pair[n] for pair in lengths] for n in (0, 1)]

    def work(document: int, first: int, rows: int) -> int:
        """Return what the row of a tile with the most of it sees."""
        queries, keys = lengths[document]
        if not causal:
            return keys if side == "q" else queries
        if side == "q":
            last = min(first + rows, queries) - 1
            return max(0, last + keys - queries + 1)
        return sum(i + keys - queries >= first for i in range(queries))

    for tiles in tiles_of(*map(bounds_of, both), side=side, causal=causal):
        done = [work(n, first, tiles.rows) for n, first in tiles.where.tolist()]
        assert done == sorted(done, reverse=True)


def test_tiles_are_kept_for_a_device():
    layout = PackedLayout.from_lengths((3, 300, 0, 64))
    meta = torch.device("meta")
    tiles = layout.tiles("q", meta, causal=True)
    assert [(x.where.shape, x.where.dtype, x.rows) for x in tiles] == [
        ((2, 2), torch.int32, 64),
        ((3, 2), torch.int32, 128),
    ]
    assert all(x.where.device == meta for x in tiles)
    assert layout.tiles("q", meta, causal=True) is tiles
    assert layout.tiles("k", meta, causal=True) is not tiles
    assert layout.tiles("q", meta, causal=False) is not tiles


@pytest.mark.parametrize("lengths", [(), (0, 0)])  # no documents; only empty ones
def test_no_tiles(lengths):
    assert PackedLayout.from_lengths(lengths).tiles("q", torch.device("cpu"), causal=True) == []


@SETTINGS
@hypothesis.given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5),
    # causal, none, a window to the right, and keys beyond a distance
    right=st.sampled_from([0, UNBOUNDED, 3, -1, -4]),
)
def test_documents_are_the_rows_that_see_a_key(lengths, right):
    layout = PackedLayout.from_lengths(*zip(*lengths, strict=True)) if lengths else (
        PackedLayout.from_lengths(())
    )  # fmt: skip
    found = {one.index: one for one in layout.documents(right)}
    for n, (queries, keys) in enumerate(lengths):
        seeing = [i for i in range(queries) if min(keys - 1, i + keys - queries + right) >= 0]
        assert (n in found) == bool(seeing)
        if seeing:
            start, end = layout.bounds_q[n : n + 2]
            assert found[n].queries == slice(start + seeing[0], end)
            assert found[n].keys == slice(*layout.bounds_k[n : n + 2])


@pytest.fixture
def readings(monkeypatch) -> list[str]:
    """Return a list that grows with every reading of boundaries, which on a GPU is a wait."""
    read, seen = _layout._bounds, []

    def counted(cu_seqlens: Tensor, name: str) -> list[int]:
        seen.append(name)
        return read(cu_seqlens, name)

    monkeypatch.setattr(_layout, "_bounds", counted)
    return seen


def attend(cu_q: Tensor | PackedLayout, cu_k: Tensor | None = None, tokens: int = 9) -> Tensor:
    """Return the result of two layers and their gradient, so that a wrong layout shows."""
    x = torch.linspace(-1, 1, tokens * 8).view(tokens, 1, 8).requires_grad_()
    out = x
    for _ in range(2):
        out = out + varlen_attention(out, out, out, cu_q, cu_k, causal=True)
    return torch.autograd.grad(out.square().sum(), x)[0]


def test_boundaries_are_read_once_for_all_layers_and_their_gradients(readings):
    cu, other = spec.boundaries([4, 5]), spec.boundaries([5, 4])
    for _ in range(2):
        attend(cu)
    assert len(readings) == 1
    # two more for a pair; a decoder's attention to an encoder does not drop that to itself
    for _ in range(2):
        attend(cu, other)
        attend(cu)
    assert len(readings) == 3


def test_a_layout_is_not_read_again(readings):
    layout = PackedLayout.from_lengths((4, 5))
    before = len(readings)
    want = attend(spec.boundaries([4, 5]))
    readings.clear()
    assert torch.equal(attend(layout), want)
    # nor are the boundaries that it gives out, alone or as a pair
    attend(layout.cu_seqlens_q)
    attend(layout.cu_seqlens_q, layout.cu_seqlens_k)
    assert (before, readings) == (1, [])
    apart = PackedLayout.from_lengths((4, 5), (4, 5))
    readings.clear()
    assert torch.equal(attend(apart), want)
    assert readings == []


def test_boundaries_changed_in_place_are_seen():
    cu = spec.boundaries([4, 5])
    before = attend(cu)
    cu[1] = 7
    changed = attend(cu)
    assert not torch.equal(changed, before)
    assert torch.equal(changed, attend(spec.boundaries([7, 2])))
    # those of keys, too
    cu_q, cu_k = spec.boundaries([4, 5]), spec.boundaries([4, 5])
    attend(cu_q, cu_k)
    cu_k[1] = 2
    assert torch.equal(attend(cu_q, cu_k), attend(spec.boundaries([4, 5]), cu_k.clone()))


def test_a_layout_is_of_the_boundaries_as_they_were():
    cu = spec.boundaries([4, 5])
    layout = PackedLayout(cu)
    want = attend(layout)
    cu[1] = 7
    assert torch.equal(attend(layout), want)
    assert layout.cu_seqlens_q.tolist() == layout.bounds_q == [0, 4, 9]


def test_boundaries_under_inference_mode_are_read_every_time():
    with torch.inference_mode():
        cu = spec.boundaries([4, 5])
        x = torch.randn(9, 1, 8)
        before = varlen_attention(x, x, x, cu)
        # leaves no trace in a version
        cu[1] = 7
        changed = varlen_attention(x, x, x, cu)
        assert not torch.equal(changed, before)
        assert torch.equal(changed, varlen_attention(x, x, x, spec.boundaries([7, 2])))


def test_cache_keeps_nothing_alive():
    gc.collect()
    size = len(_layout._SEEN)
    cu_q, cu_k = spec.boundaries([4, 5]), spec.boundaries([5, 4])
    attend(cu_q, cu_k)
    layout = weakref.ref(layout_of(cu_q, cu_k, tokens_q=9, tokens_k=9))
    tensors = weakref.ref(cu_q), weakref.ref(cu_k)
    assert layout() is not None
    del cu_k
    gc.collect()
    assert tensors[1]() is None
    del cu_q
    gc.collect()
    assert (tensors[0](), layout()) == (None, None)
    assert len(_layout._SEEN) == size


def test_freed_boundaries_are_not_taken_for_others():
    # new tensors at the addresses of freed ones, with the same version
    for length in range(1, 60):
        cu = torch.tensor([0, length % 9, 9])
        layout = layout_of(cu, torch.tensor([0, 9 - length % 9, 9]), tokens_q=9, tokens_k=9)
        assert (layout.bounds_q[1], layout.bounds_k[1]) == (length % 9, 9 - length % 9)
        # keys that are gone are not the same as none
        assert layout_of(cu, None, tokens_q=9, tokens_k=9).bounds_k == [0, length % 9, 9]


def test_boundaries_of_keys_are_not_kept_without_end():
    cu = spec.boundaries([4, 5])
    keys = [spec.boundaries([n, 9 - n]) for n in range(9)]
    for cu_k in keys:
        layout_of(cu, cu_k, tokens_q=9, tokens_k=9)
    assert len(_layout._SEEN[cu]) <= _layout._SIDES


def test_layout_on_another_device():
    layout = PackedLayout.from_lengths((4, 0, 5), (1, 2, 3))
    moved = layout.to("meta")
    assert moved.cu_seqlens_q.is_meta
    assert moved.cu_seqlens_k.is_meta
    assert (moved.bounds_q, moved.bounds_k) == (layout.bounds_q, layout.bounds_k)
    assert (moved.max_seqlen_q, moved.max_seqlen_k) == (5, 3)
    assert layout.to("cpu") is layout
    # the layers of a model on a device with boundaries on the CPU share one copy
    assert layout.to("meta") is moved
    assert moved.to("meta") is moved
    # one tensor for both sides stays one, which saves a copy per layer
    assert PackedLayout.from_lengths((4, 5)).to("meta").boundaries()[1] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 2), (3,)), r"lengths has 2 entries, lengths_k 1 and groups 2"),
        (((1, 2), None, (0,)), r"lengths has 2 entries, lengths_k 2 and groups 1"),
        (((1, -2),), r"must not be negative"),
    ],
)
def test_bad_lengths_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PackedLayout.from_lengths(
            *arguments[:2], **dict(zip(["groups"], arguments[2:], strict=False))
        )


def test_layout_and_boundaries_of_keys_are_refused_together():
    layout = PackedLayout.from_lengths((4, 5))
    with pytest.raises(ValueError, match="cu_seqlens_k is given next to a PackedLayout"):
        attend(layout, layout.cu_seqlens_q)


@pytest.mark.parametrize("inference", [False, True])  # whose tensors have no version
def test_a_layout_is_found_again_for_every_layer_and_backward(monkeypatch, inference):
    made = []
    init = PackedLayout.__init__
    monkeypatch.setattr(
        PackedLayout, "__init__", lambda self, *args: made.append(1) or init(self, *args)
    )
    with torch.inference_mode(inference):
        x = torch.randn(9, 1, 8, requires_grad=not inference)
        layout = PackedLayout.from_lengths([4, 5])
        out = varlen_attention(varlen_attention(x, x, x, layout), x, x, layout)
    # as in a model, where the layout is gone when backward begins
    del layout
    gc.collect()
    if not inference:
        out.sum().backward()
    assert len(made) == 1
