"""Draws: pinned, exact after resume on any world size, true to their weights, fair to samples."""

import json
import math
import time
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apical.growth.continual import Mixture, replay, token_weights

PINNED = [
    ("a", 3),
    ("a", 5),
    ("a", 8),
    ("a", 7),
    ("a", 6),
    ("a", 0),
    ("b", 2),
    ("b", 3),
    ("a", 1),
    ("a", 4),
    ("a", 2),
    ("a", 2),
]


def mixture(sizes=None, weights=None, seed=7):
    return Mixture(
        sizes=sizes or {"new": 500, "old": 30},
        weights=weights or {"new": 0.95, "old": 0.05},
        seed=seed,
    )


def draws(source, count):
    return [source.draw() for _ in range(count)]


@st.composite
def mixtures(draw):
    sizes = draw(st.dictionaries(st.text(max_size=3), st.integers(1, 40), min_size=1, max_size=4))
    weights = {name: draw(st.sampled_from([0.0, 0.1, 1.0, 7.0])) for name in sizes}
    weights[draw(st.sampled_from(sorted(sizes)))] = 0.5
    return {"sizes": sizes, "weights": weights, "seed": draw(st.integers(0, 2**64 - 1))}


def test_the_stream_is_pinned():
    # a change here silently changes every run that is resumed
    assert draws(mixture({"a": 9, "b": 4}, {"a": 3, "b": 1}, seed=0), 12) == PINNED


@settings(deadline=None)
@given(mixtures(), st.integers(0, 1500), st.integers(1, 30))
def test_resume_at_any_draw(arguments, before, after):
    whole = Mixture(**arguments)
    draws(whole, before)
    resumed = Mixture(**arguments)
    resumed.load(json.loads(json.dumps(whole.state())))
    assert draws(resumed, after) == draws(whole, after)


@settings(deadline=None)
@given(mixtures(), st.integers(1, 300))
def test_every_sample_once_per_epoch(arguments, count):
    drawn = draws(Mixture(**arguments), count)
    for name, size in arguments["sizes"].items():
        indices = [index for source, index in drawn if source == name]
        for start in range(0, len(indices), size):
            epoch = indices[start : start + size]
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= set(range(size))


def test_epochs_have_orders_of_their_own():
    drawn = [index for _, index in draws(mixture({"a": 50}, {"a": 1.0}), 200)]
    epochs = [drawn[start : start + 50] for start in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert all(one != other for one, other in pairwise(epochs))


@pytest.mark.parametrize(
    "rate", [0.005, 0.05, 0.25, 0.5], ids=["rare", "weak shift", "strong shift", "even"]
)
def test_realised_share_is_within_three_sigma(rate):
    count = 20_000
    drawn = draws(mixture(weights=replay({"new": 1}, {"old": 1}, rate=rate)), count)
    share = Counter(name for name, _ in drawn)["old"] / count
    assert abs(share - rate) < 3 * math.sqrt(rate * (1 - rate) / count)


def test_replay_repeats_without_ending_the_epoch_of_the_new():
    drawn = draws(mixture({"new": 400, "old": 2}, {"new": 0.5, "old": 0.5}), 790)
    old = [index for name, index in drawn if name == "old"]
    new = [index for name, index in drawn if name == "new"]
    assert len(old) > 100 * 2
    assert len(set(new)) == min(len(new), 400)


def test_four_ranks_then_two_are_one():
    size, steps = 8, 20
    whole = draws(mixture(), 2 * size * steps)

    def trained(ranks, state):
        # every rank draws the global batch and keeps its own part of it
        own = [mixture() for _ in range(ranks)]
        parts = []
        for rank in own:
            if state:
                rank.load(state)
        for _ in range(steps):
            batches = [draws(rank, size) for rank in own]
            for place, batch in enumerate(batches):
                parts += batch[place * size // ranks : (place + 1) * size // ranks]
        return parts, own[-1].state()

    first, state = trained(4, None)
    second, _ = trained(2, state)
    assert first + second == whole


def test_a_source_of_weight_zero_changes_nothing():
    plain = draws(mixture({"new": 500}, {"new": 1.0}), 2000)
    weights = replay({"new": 1.0}, {"old": 1.0}, rate=0.0)
    assert draws(mixture({"old": 30, "new": 500}, weights), 2000) == plain
    assert draws(mixture({"new": 500, "old": 0}, weights), 2000) == plain
    assert draws(mixture({"new": 500, "old": 30}, {"new": 1.0}), 2000) == plain


def test_the_order_of_names_does_not_matter():
    turned = mixture({"old": 30, "new": 500}, {"old": 0.05, "new": 0.95})
    assert draws(turned, 500) == draws(mixture(), 500)


def test_only_proportions_of_weights_matter():
    scaled = mixture(weights={"new": 19 * 4, "old": 4})
    assert draws(scaled, 500) == draws(mixture(weights={"new": 19, "old": 1}), 500)


def test_another_source_keeps_the_orders_of_the_others():
    more = mixture({"new": 500, "old": 30, "x": 9}, {"new": 0.5, "old": 0.2, "x": 0.3})
    drawn = draws(mixture(), 3000), draws(more, 3000)
    for name in ("new", "old"):
        one, other = ([index for source, index in each if source == name] for each in drawn)
        common = min(len(one), len(other))
        assert common > 100
        assert one[:common] == other[:common]


def test_seeds_differ():
    assert draws(mixture(seed=1), 100) != draws(mixture(seed=2), 100)


def test_peek_does_not_move():
    one = mixture()
    for _ in range(2000):
        state = one.state()
        seen = one.peek()
        assert one.state() == state
        assert one.draw() == seen


def test_state_is_a_copy():
    one = mixture()
    state = one.state()
    draws(one, 5)
    assert state == {"draws": 0, "counts": {"new": 0, "old": 0}}


def test_ten_thousand_draws_take_less_than_a_second():
    fast = mixture({"a": 10**6, "b": 10**4}, {"a": 0.9, "b": 0.1})
    # the permutation of an epoch is made at its first draw
    draws(fast, 100)
    start = time.perf_counter()
    draws(fast, 10_000)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"weights": {"a": -1.0, "b": 2}}, r"weights\['a'\] is -1", id="negative"),
        pytest.param({"weights": {"a": math.nan}}, r"weights\['a'\] is nan", id="nan"),
        pytest.param({"weights": {"a": math.inf}}, r"weights\['a'\] is inf", id="infinite"),
        pytest.param({"weights": {"a": 0.0}}, "zero-token mixture", id="all zero"),
        pytest.param({"weights": {}}, "zero-token mixture", id="none at all"),
        pytest.param({"weights": {"c": 1.0}}, r"'c', but the sources are \['a', 'b'\]", id="alien"),
        pytest.param({"sizes": {"a": 0, "b": 1}}, "source 'a' is empty", id="empty but weighted"),
        pytest.param({"sizes": {"a": -1, "b": 1}}, r"sizes\['a'\] is -1", id="negative size"),
        pytest.param({"seed": -1}, "seed is -1", id="negative seed"),
        pytest.param({"seed": 2**64}, "seed is", id="seed of 65 bits"),
    ],
)
def test_mixture_refuses(changes, message):
    arguments = {"sizes": {"a": 3, "b": 2}, "weights": {"a": 0.5, "b": 0.5}, "seed": 0}
    with pytest.raises(ValueError, match=message):
        Mixture(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param({"draws": 1, "counts": {"new": 1}}, "has sources", id="a source is missing"),
        pytest.param({"draws": 3, "counts": {"new": 1, "old": 1}}, "damaged", id="a draw is lost"),
        pytest.param({"draws": 0, "counts": {"new": 1, "old": -1}}, "damaged", id="negative"),
    ],
)
def test_damaged_states_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        mixture().load(state)


@given(
    st.dictionaries(
        st.sampled_from("abcd"), st.tuples(st.floats(0.01, 1), st.floats(2, 1e4)), min_size=1
    )
)
def test_token_weights_give_the_shares_asked_for(sources):
    shares = {name: share for name, (share, _) in sources.items()}
    lengths = {name: length for name, (_, length) in sources.items()}
    rates = token_weights(shares, lengths)
    assert sum(rates.values()) == pytest.approx(1)
    tokens = {name: rates[name] * lengths[name] for name in rates}
    for name in shares:
        realised = tokens[name] / sum(tokens.values())
        assert realised == pytest.approx(shares[name] / sum(shares.values()))


def test_token_weights_need_no_length_of_an_unused_source():
    assert token_weights({"a": 1.0, "b": 0.0}, {"a": 10.0}) == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize("length", [0.0, -1.0, math.nan, math.inf])
def test_token_weights_refuse_lengths(length):
    with pytest.raises(ValueError, match=r"mean_lengths\['a'\] is"):
        token_weights({"a": 1.0}, {"a": length})


def test_replay_takes_the_place_of_new_samples():
    weights = replay({"code": 3, "maths": 1}, {"prose": 2}, rate=0.25)
    assert weights == pytest.approx({"code": 0.5625, "maths": 0.1875, "prose": 0.25})


def test_replay_of_a_source_that_is_also_new_adds_up():
    assert replay({"a": 1}, {"a": 1, "b": 1}, rate=0.5) == pytest.approx({"a": 0.75, "b": 0.25})


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_replay_refuses_rates(rate):
    with pytest.raises(ValueError, match="rate is"):
        replay({"a": 1}, {"b": 1}, rate=rate)
