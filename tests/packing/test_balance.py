"""Plans: nothing lost, equal counts, equal work, the same on every rank."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apical.packing import Cost, imbalance, plan

LENGTHS = st.lists(st.integers(0, 500), max_size=60)
RANKS = st.integers(1, 8)
SQUARES = Cost(linear=3, quadratic=2)


@pytest.mark.parametrize(
    "options",
    [{"method": "columns"}, {"equal_counts": True}, {"equal_counts": False}, {"cost": SQUARES}],
)
@given(lengths=LENGTHS, ranks=RANKS)
def test_every_document_has_one_rank(options, lengths, ranks):
    assigned = plan(lengths, ranks, **options)
    assert len(assigned) == ranks
    assert sorted(n for documents in assigned for n in documents) == list(range(len(lengths)))
    if options.get("equal_counts", True):
        counts = [len(documents) for documents in assigned]
        assert max(counts) - min(counts) <= 1


@given(batch=st.integers(1, 6), ranks=RANKS, data=st.data())
def test_columns_are_those_of_the_paper(batch, ranks, data):
    # few values: the sort must be stable
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=batch * ranks, max_size=batch * ranks))
    order = torch.tensor(lengths).neg().argsort(stable=True)
    assert plan(lengths, ranks, method="columns") == order.view(batch, ranks).T.tolist()


def test_cost_takes_the_most_expensive_first():
    # Graham's worst case for three ranks: 11, where 9 would do (5 + 4, 5 + 4, 3 + 3 + 3)
    lengths = [3, 5, 4, 3, 4, 5, 3]
    work = [sum(lengths[n] for n in d) for d in plan(lengths, 3, equal_counts=False)]
    assert sorted(work) == [8, 8, 11]


@given(
    shares=st.lists(st.sets(st.integers(1, 99), max_size=8), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_cost_is_within_four_thirds_of_the_best(shares, order):
    # as many equal shares of 100 as ranks, cut at random places: the best is 100 for each
    cuts = [[0, *sorted(places), 100] for places in shares]
    lengths = [b - a for places in cuts for a, b in pairwise(places)]
    order.shuffle(lengths)
    ranks = len(shares)
    assigned = plan(lengths, ranks, equal_counts=False)
    assert imbalance(lengths, assigned) <= 4 / 3 - 1 / (3 * ranks) + 1e-9


def skewed(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(count, generator=generator)
        .mul(0.8)
        .add(5.4)
        .exp()
        .long()
        .clamp(max=1024)
        .tolist()
    )


# tokens; tokens and squares, so that a plan by tokens would show
@pytest.mark.parametrize("cost", [Cost(), Cost(linear=100, quadratic=1)])
def test_balanced_by_cost_beats_columns_beats_the_given_order(cost):
    lengths = skewed(8 * 32)
    given_order = [list(range(r * 32, r * 32 + 32)) for r in range(8)]
    columns = plan(lengths, 8, method="columns")
    equal = plan(lengths, 8, cost=cost)
    free = plan(lengths, 8, cost=cost, equal_counts=False)
    measures = [imbalance(lengths, assigned, cost) for assigned in (free, equal, columns)]
    assert measures == sorted(measures)
    assert measures[2] < imbalance(lengths, given_order, cost)
    assert measures[1] < 1.05


def test_the_cost_that_is_balanced_is_the_one_given():
    lengths = [8, 4, 4, 1, 1, 1, 1, 1, 1, 1, 1]
    tokens = plan(lengths, 2, equal_counts=False)
    squares = plan(lengths, 2, cost=Cost(0, 1), equal_counts=False)
    assert imbalance(lengths, tokens) == 1
    # the long one alone costs more than the rest
    assert [0] in squares


def test_ranks_keep_the_order_of_the_documents():
    assert all(d == sorted(d) for d in plan(skewed(64), 4))


def test_imbalance_is_the_most_over_the_mean():
    assert imbalance([1, 2, 3], [[0, 1], [2]]) == 1
    assert imbalance([1, 2, 3], [[2, 1], [0]]) == pytest.approx(5 / 3)
    assert imbalance([1, 2, 3], [[0, 1], [2]], Cost(0, 1)) == pytest.approx(9 / 7)
    assert imbalance([0], [[0], []]) == 1
    assert imbalance([], [[], []]) == 1


@pytest.mark.parametrize("length", [1, 7, 300])
def test_operations_are_those_that_training_counts(length):
    from transformers import LlamaConfig

    from apical.growth.train.flops import causal_pairs, cost_of_config

    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    ours = Cost.of_transformer(width=32, layers=3, feed_forward=48, kv_width=16, vocabulary=61)
    flops = cost_of_config(config).flops(tokens=length, pairs=causal_pairs([length]))
    assert math.isclose(ours(length), flops, rel_tol=1e-12)


def test_a_bidirectional_model_attends_to_all_pairs():
    options = {"width": 8, "layers": 2, "feed_forward": 16, "gated": False}
    both = Cost.of_transformer(**options, causal=False)
    # 2 layers of 4 * 8 * 8 + 2 * 8 * 16 weights; 12 operations per pair, channel and layer
    assert both == Cost(linear=6 * 2 * 512, quadratic=12 * 2 * 8)
    assert Cost.of_transformer(**options).quadratic == both.quadratic / 2


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"ranks is 0"):
        plan([1], 0)
    with pytest.raises(ValueError, match=r"lengths hold -2"):
        plan([1, -2], 1)
    with pytest.raises(ValueError, match=r"method is 'rows', expected 'cost' or 'columns'"):
        plan([1], 1, method="rows")
    with pytest.raises(ValueError, match=r"negative part"):
        Cost(1, -1)
    with pytest.raises(ValueError, match=r"assignment is empty"):
        imbalance([1], [])
