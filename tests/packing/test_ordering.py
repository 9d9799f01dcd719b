"""The order of in-context pre-training, against the walk written down step by step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apical.packing import (
    ContextOrder,
    PackedCollator,
    context_order,
    hashed_embeddings,
    nearest_neighbours,
    pack,
)


@st.composite
def graphs(draw) -> list[list[int]]:
    count = draw(st.integers(1, 30))
    # -1 is what searches return for "none"; the document itself comes first in many
    row = st.lists(st.integers(-1, count - 1), max_size=6)
    return draw(st.lists(row, min_size=count, max_size=count))


def step_by_step(near: list[list[int]], longest: int, shortest: int) -> list[list[int]]:
    """Return the groups, by sets and lists that are searched anew at each step."""
    near = [[n for n in row if n not in (-1, i)] for i, row in enumerate(near)]
    edges = {frozenset((i, n)) for i, row in enumerate(near) for n in row}
    unseen, paths = set(range(len(near))), []
    while unseen:
        path = [min(unseen, key=lambda i: (sum(i in edge for edge in edges), i))]
        unseen.remove(path[0])
        while len(path) < longest and (nexts := [n for n in near[path[-1]] if n in unseen]):
            path.append(nexts[0])
            unseen.remove(nexts[0])
        paths.append(path)
    kept = [len(path) >= shortest for path in paths]
    groups = [path if keep else [] for path, keep in zip(paths, kept, strict=True)]
    for number, path in enumerate(paths):
        for document in [] if kept[number] else path:
            homes = [group for group, keep in zip(groups, kept, strict=True) if keep]
            found = [(n, home) for n in near[document] for home in homes if n in home]
            if found:
                target, home = found[0]
                home.insert(home.index(target), document)
            else:
                groups[number].append(document)
    return [group for group in groups if group]


@given(near=graphs(), lengths=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_order_is_that_of_the_walk_step_by_step(near, lengths):
    shortest, longest = sorted(lengths)
    result = context_order(near, path_length=longest, shortest_path=shortest)
    expected = step_by_step(near, longest, shortest)
    assert result.order == [n for group in expected for n in group]
    assert result.groups == [number for number, group in enumerate(expected) for _ in group]
    assert result.dropped == []
    # the released code loses documents whose neighbours are all in their own path
    assert sorted(result.order) == list(range(len(near)))


def test_a_path_begins_where_the_degree_is_lowest():
    # 3 is nobody's neighbour; the chain from 0 would leave it for the end
    near = [[1], [2, 0], [1, 0], [2]]
    assert context_order(near, path_length=4).order == [3, 2, 1, 0]


def test_a_path_ends_when_it_is_full_or_has_nowhere_to_go():
    near = [[(n + 1) % 10, (n - 1) % 10] for n in range(10)]
    result = context_order(near, path_length=4, shortest_path=1)
    assert result.order == list(range(10))
    assert result.groups == [0] * 4 + [1] * 4 + [2] * 2


def test_short_paths_are_put_before_their_nearest_neighbours():
    chain = [[1], [2], [3], []]
    # 5 comes first and prefers 4, which has no place yet; 4 has only been taken from its own path
    near = [*chain, [2, 1, 0], [4, 3, 2]]
    assert context_order(near, path_length=4).order == [0, 1, 4, 2, 5, 3]
    # 4 comes first, and 5 goes to where 4 went
    near = [*chain, [5, 2], [4, 3, 2, 1]]
    assert context_order(near, path_length=4).order == [0, 1, 5, 4, 2, 3]
    # these two know each other alone, and stay together
    near = [*chain, [5], [4]]
    result = context_order(near, path_length=4)
    assert result == ContextOrder([0, 1, 2, 3, 4, 5], [0] * 4 + [1] * 2, [])


def test_nothing_is_lost_when_no_path_is_long_enough():
    # the released code takes all apart and finds no place for any
    result = context_order([[1], [0], []], path_length=21)
    assert result == ContextOrder([2, 0, 1], [0, 1, 1], [])
    assert context_order([]) == ContextOrder([], [], [])


TEXTS = [
    "the quick brown fox jumps over the lazy dog" + " tail" * 30,
    "the quick brown fox jumps over the lazy dog" + " tail" * 30 + " another end",
    "the quick brown fox jumped over the lazy dogs and ran",
    "something else",
    "the quick brown fox jumps over the lazy dog" + " tail" * 30,
]


def test_documents_that_repeat_the_one_before_are_dropped():
    # in the order 0, 1, 2, 3, 4; 4 equals 0, but is not next to it
    near = [[1], [2], [3], [4], []]
    result = context_order(near, texts=TEXTS, path_length=5)
    # a path begins at 0 or 4, which have one edge each; 0 has the lower index
    assert result == ContextOrder([0, 2, 3, 4], [0] * 4, [1])
    # 2 shares more than a third of its pieces with 0
    loose = context_order(near, texts=TEXTS, path_length=5, similarity=0.3)
    assert loose.dropped == [1, 2]


def test_the_first_hundred_characters_decide():
    head = "".join(chr(200 + n) for n in range(100))
    near = [[1], []]
    tails = ["".join(chr(start + n) for n in range(100)) for start in (400, 600)]
    assert context_order(near, texts=[head + tail for tail in tails]).dropped == [1]
    # 98 pieces each, of which 98 - n are shared and 3 are new: 86 / 101 and 85 / 101
    for changed, dropped in ((12, [1]), (13, [])):
        other = head[:-changed] + "~" * changed
        assert context_order(near, texts=[head, other]).dropped == dropped


@pytest.mark.parametrize(
    ("texts", "dropped"),
    [
        (["", ""], [1]),  # no piece at all; the released code divides by zero
        (["ab", "ab"], [1]),  # shorter than a piece
        (["ab", "ac"], []),
        (["", "abc"], []),
    ],
)
def test_short_texts_are_compared_whole(texts, dropped):
    assert context_order([[1], [0]], texts=texts).dropped == dropped


def test_repeats_are_found_across_groups_and_empty_no_group():
    near = [[], [], []]
    result = context_order(near, texts=["same text"] * 2 + ["other words"], path_length=2)
    assert result == ContextOrder([0, 2], [0, 1], [1])


@pytest.mark.parametrize(
    ("near", "options", "message"),
    [
        ([[1], [2]], {}, r"document 1 has neighbour 2, expected -1 to 1"),
        ([[-2], []], {}, r"document 0 has neighbour -2"),
        ([[]], {"texts": []}, r"texts has 0 entries, expected one for each of 1"),
        ([[]], {"path_length": 0}, r"shortest_path is 0 and path_length 0"),
        ([[]], {"path_length": 2, "shortest_path": 3}, r"shortest_path is 3 and path_length 2"),
        ([[]], {"similarity": 85}, r"similarity is 85, expected 0 to 1"),
    ],
)
def test_what_makes_no_order_is_refused(near, options, message):
    with pytest.raises(ValueError, match=message):
        context_order(near, **options)


def topics(count: int) -> list[str]:
    """Return texts about three topics in turn, with words of their own."""
    words = [[f"{topic}{n}" for n in range(12)] for topic in ("cat", "bank", "star")]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, 12, (count, 8), generator=generator).tolist()
    return [" ".join(words[n % 3][i] for i in row) for n, row in enumerate(picks)]


def test_from_texts_to_batches():
    texts = topics(30)
    near = nearest_neighbours(hashed_embeddings(texts), 9)
    found = context_order(near, texts=texts, path_length=10)
    # whoever comes next is of the same topic, except where a group ends
    pairs = zip(found.order, found.order[1:], found.groups, found.groups[1:], strict=False)
    assert all((a - b) % 3 == 0 for a, b, one, other in pairs if one == other)
    assert len(set(found.groups)) < 10
    tokens = [list(range(1, 2 + n % 5)) for n in found.order]
    packs = pack(list(map(len, tokens)), 16, method="next_fit")
    assert [n for places in packs for n in places] == list(range(len(tokens)))
    features = [
        {"input_ids": tokens[n], "group": found.groups[n]} for places in packs[:1] for n in places
    ]
    row = PackedCollator(max_tokens=16)(features)
    assert len(row["cu_seq_lens_q"]) - 1 == len({feature["group"] for feature in features})
