"""Packs: every document once, within capacity, by the rule that was asked for."""

from collections import Counter, deque
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apical.packing import PackStream, pack, pack_stream

METHODS = ["best_fit_decreasing", "first_fit_decreasing", "best_fit", "first_fit", "next_fit"]
# few distinct lengths, so that ties are common; 0: empty documents; 12: the whole capacity
SMALL = st.lists(st.integers(0, 12), max_size=40)


def naive(lengths: list[int], capacity: int, method: str) -> list[list[int]]:
    """The definition of each method, by looking at every pack for every document."""
    order = list(range(len(lengths)))
    if method.endswith("decreasing"):
        order.sort(key=lambda n: -lengths[n])
    packs, free, used = [], [], []
    for time, n in enumerate(order):
        fits = [p for p in range(len(packs)) if free[p] >= lengths[n]]
        if method == "next_fit":
            fits = [p for p in fits if p == len(packs) - 1]
        if method.startswith("best"):
            fits.sort(key=lambda p: (free[p], -used[p]))
        if not fits:
            packs, free, used = [*packs, []], [*free, capacity], [*used, time]
            fits = [len(packs) - 1]
        packs[fits[0]].append(n)
        free[fits[0]] -= lengths[n]
        used[fits[0]] = time
    return packs


@pytest.mark.parametrize("method", METHODS)
@given(lengths=SMALL, capacity=st.integers(12, 30))
def test_packs_are_those_of_the_definition(method, lengths, capacity):
    packs = pack(lengths, capacity, method=method)
    assert packs == naive(lengths, capacity, method)
    assert sorted(n for places in packs for n in places) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in places) <= capacity for places in packs)


@pytest.mark.parametrize("method", METHODS[:2])
@given(
    packs=st.lists(st.sets(st.integers(1, 59), max_size=6), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
)
def test_decreasing_needs_at_most_eleven_ninths_of_the_fewest_packs(method, packs, order):
    # full packs cut at random places: so many packs are needed, and they are enough
    cuts = [[0, *sorted(places), 60] for places in packs]
    lengths = [b - a for places in cuts for a, b in pairwise(places)]
    order.shuffle(lengths)
    assert len(pack(lengths, 60, method=method)) <= 11 / 9 * len(packs) + 1


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("times", [1, 10])
def test_the_known_worst_case_of_decreasing(method, times):
    # 6 packs of 510 + 260 + 230 and 3 of 270 + 270 + 230 + 230 are full
    lengths = times * (6 * [510] + 6 * [270] + 6 * [260] + 12 * [230])
    assert sum(lengths) == times * 9 * 1000
    assert len(pack(lengths, 1000, method=method)) == times * 11


def test_the_known_worst_cases_in_order():
    # 10 packs of two halves and one of ones would do
    halves = 20 * [50, 1]
    assert len(pack(halves, 100, method="next_fit")) == 20
    assert len(pack(halves, 100, method="first_fit")) == 11
    # the fuller pack, not the first one, leaves room for the 7
    assert len(pack([3, 8, 2, 7], 10, method="best_fit")) == 2
    assert len(pack([3, 8, 2, 7], 10, method="first_fit")) == 3


def test_next_fit_keeps_the_order():
    lengths = [5, 5, 1, 9, 0, 10, 0]
    assert pack(lengths, 10, method="next_fit") == [[0, 1], [2, 3, 4], [5, 6]]


@pytest.mark.parametrize("method", METHODS)
def test_edges(method):
    assert pack([], 5, method=method) == []
    # documents without tokens take no room, but are not lost
    assert pack([0, 0, 0], 1, method=method) == [[0, 1, 2]]
    assert pack([1, 0], 1, method=method) == [[0, 1]]
    assert pack([7, 7], 7, method=method) == [[0], [1]]


def test_lengths_may_be_an_array_or_a_tensor():
    lengths = [5, 3, 4, 1]
    for same in (np.array(lengths, dtype=np.uint16), torch.tensor(lengths), tuple(lengths)):
        assert pack(same, 8) == pack(lengths, 8)


@pytest.mark.parametrize("method", METHODS[:4])
def test_many_documents_fill_their_packs(method):
    # takes minutes if the time is quadratic
    lengths = np.random.default_rng(0).lognormal(5.4, 0.8, 100_000).astype(int).clip(1, 2048)
    packs = pack(lengths, 2048, method=method)
    assert lengths.sum() / (2048 * len(packs)) > 0.99
    assert sorted(n for places in packs for n in places) == list(range(100_000))


@pytest.mark.parametrize(
    ("lengths", "capacity", "method", "message"),
    [
        ([3, 9], 8, "best_fit", r"document 1 has 9 tokens, a pack holds 8: split or truncate"),
        ([3, -1], 8, "best_fit", r"document 1 has length -1, expected an integer, 0 or more"),
        ([2.0], 8, "best_fit", r"document 0 has length 2.0, expected an integer"),
        ([True], 8, "best_fit", r"document 0 has length True, expected an integer"),
        ([None], 8, "best_fit", r"document 0 has length None, expected an integer"),
        ([1], 0, "best_fit", r"capacity is 0, expected an integer of at least 1"),
        ([], -1, "best_fit", r"capacity is -1"),
        ([1], 8.0, "best_fit", r"capacity is 8.0, expected an integer"),
        ([1], 8, "bfd", r"method is 'bfd', expected one of best_fit_decreasing, first_fit"),
    ],
)
def test_what_cannot_be_packed_is_refused(lengths, capacity, method, message):
    with pytest.raises(ValueError, match=message):
        pack(lengths, capacity, method=method)


@given(
    lengths=st.lists(st.integers(0, 12), max_size=60),
    buffer=st.integers(1, 70),  # 70: more than there are
)
def test_a_stream_loses_nothing_and_holds_at_most_its_buffer(lengths, buffer):
    taken, waits = 0, 0

    def documents():
        nonlocal taken, waits
        for number in range(len(lengths)):
            waits = max(waits, taken - left)
            taken += 1
            yield number

    left, seen = 0, []
    for places in pack_stream(documents(), 12, length=lengths.__getitem__, buffer=buffer):
        left += len(places)
        seen.append(places)
        assert 0 < sum(lengths[n] for n in places) <= 12 or not any(lengths[n] for n in places)
    assert waits < buffer
    assert Counter(n for places in seen for n in places) == Counter(range(len(lengths)))
    assert all(places == sorted(places) for places in seen)


@given(lengths=SMALL)
def test_a_stream_within_the_buffer_is_packed_as_a_whole(lengths):
    stream = pack_stream(range(len(lengths)), 12, length=lengths.__getitem__, buffer=41)
    assert sorted(stream) == sorted(sorted(places) for places in pack(lengths, 12))


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=200), buffer=st.integers(1, 9))
def test_no_document_waits_longer_than_buffer_rounds(lengths, buffer):
    stream = PackStream(12, length=lengths.__getitem__, buffer=buffer)
    rounds, waiting = 0, deque()
    for number in range(len(lengths)):
        waiting.append((number, rounds))
        if packs := stream.add(number):
            rounds += 1
            gone = {n for places in packs for n in places}
            # the one that waited longest is among them
            assert waiting[0][0] in gone
            waiting = deque(pair for pair in waiting if pair[0] not in gone)
        assert all(rounds - came < buffer for _, came in waiting)


def test_an_awkward_document_does_not_wait_for_the_end():
    # nothing fits beside the 3: by fill alone it would never leave
    documents = ["abc", *["abcde"] * 40]
    packs = list(pack_stream(documents, 5, buffer=4))
    assert packs.index(["abc"]) < 4


def test_packs_that_leave_together_keep_the_order():
    # the fullest pack is the last one
    lengths = [3, 3, 5]
    stream = PackStream(5, length=lengths.__getitem__, buffer=9)
    assert [stream.add(number) for number in range(3)] == [[]] * 3
    assert stream.flush() == [[0], [1], [2]]


def test_a_larger_buffer_fills_better():
    lengths = np.random.default_rng(1).integers(1, 100, 5000).tolist()
    counts = [
        len(list(pack_stream(range(5000), 100, length=lengths.__getitem__, buffer=buffer)))
        for buffer in (1, 10, 100, 1000)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 5000
    assert sum(lengths) / (100 * counts[-1]) > 0.99


def test_a_refused_document_leaves_the_stream_as_it_was():
    stream = PackStream(3, buffer=10)
    assert stream.add([1, 2]) == []
    with pytest.raises(ValueError, match=r"document 1 has 4 tokens, a pack holds 3"):
        stream.add([1, 2, 3, 4])
    assert stream.add([3]) == []
    assert stream.flush() == [[[1, 2], [3]]]
    assert stream.flush() == []


def test_stream_options_are_checked():
    with pytest.raises(ValueError, match=r"buffer is 0, expected at least 1"):
        PackStream(3, buffer=0)
    with pytest.raises(ValueError, match=r"capacity is 0"):
        list(pack_stream([], 0))


def test_packs_do_not_depend_on_what_is_packed_later():
    lengths = np.random.default_rng(2).integers(1, 50, 400).tolist()
    stream = list(pack_stream(range(400), 50, length=lengths.__getitem__, buffer=32))
    start = list(pack_stream(range(200), 50, length=lengths.__getitem__, buffer=32))
    ends = [n for n, held in enumerate(accumulate(map(len, stream))) if held <= 200 - 32]
    assert ends
    assert stream[: ends[-1]] == start[: ends[-1]]
