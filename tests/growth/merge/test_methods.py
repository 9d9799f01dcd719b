"""How much of each model is in the merged one, against the papers' formulas in float64."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import apical

_NUMBERS = st.lists(st.floats(-3, 3), min_size=1, max_size=6)
_POSITIVE = st.lists(st.floats(0.01, 9), min_size=1, max_size=6)


@given(_POSITIVE)
def test_a_weighted_average_is_the_weights_over_their_sum(weights):
    expected = [weight / math.fsum(weights) for weight in weights]
    assert apical.Average(weights).coefficients(len(weights)) == pytest.approx(expected)
    # a multiple of the weights is the same average
    doubled = apical.Average([2 * weight for weight in weights])
    assert doubled.coefficients(len(weights)) == apical.Average(weights).coefficients(len(weights))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_an_average_has_an_equal_share_of_each(count):
    assert apical.Average().coefficients(count) == (1 / count,) * count


@given(st.floats(0, 0.999), st.lists(st.floats(-9, 9), min_size=1, max_size=9))
def test_ema_is_its_recursion(decay, models):
    average = models[0]
    for model in models[1:]:
        average = decay * average + (1 - decay) * model
    shares = apical.EMA(decay).coefficients(len(models))
    merged = sum(c * model for c, model in zip(shares, models, strict=True))
    assert merged == pytest.approx(average, abs=1e-12)


def test_without_decay_the_newest_is_all():
    assert apical.EMA(0.0).coefficients(3) == (0, 0, 1)


@given(_NUMBERS)
def test_linear_weights_stay_as_they_are(weights):
    assert apical.Linear(weights).coefficients(len(weights)) == tuple(weights)


@given(_NUMBERS, st.data())
def test_task_vectors_are_added_to_the_base(scales, data):
    size = len(scales) + 1
    base, *models = data.draw(st.lists(st.floats(-9, 9), min_size=size, max_size=size))
    expected = base + sum(s * (m - base) for s, m in zip(scales, models, strict=True))
    shares = apical.TaskVectors(scales=scales).coefficients(size)
    merged = sum(c * m for c, m in zip(shares, [base, *models], strict=True))
    assert merged == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("scale", "count", "shares"),
    [
        pytest.param(-0.5, 2, (1.5, -0.5), id="forgets"),
        pytest.param(0.3, 3, (0.4, 0.3, 0.3), id="one for all"),
        pytest.param(0.0, 2, (1.0, 0.0), id="the base"),
        pytest.param(1.0, 2, (0.0, 1.0), id="the model"),
    ],
)
def test_one_scale_for_all_tasks(scale, count, shares):
    assert apical.TaskVectors(scale).coefficients(count) == pytest.approx(shares)


@given(st.lists(st.floats(-700, 700), min_size=2, max_size=5), st.data())
def test_a_posterior_is_bayes_rule(scores, data):
    size = len(scores)
    prior = data.draw(st.lists(st.floats(0.1, 1), min_size=size, max_size=size))
    found = apical.Posterior(scores, prior).coefficients(size)
    assert math.fsum(found) == pytest.approx(1)
    # p_i / p_0 = prior_i / prior_0 * exp(score_i - score_0), where exp does not leave its range
    for share, score, p in zip(found, scores, prior, strict=True):
        if abs(score - scores[0]) < 300 and min(share, found[0]) > 1e-200:
            ratio = p / prior[0] * math.exp(score - scores[0])
            assert share / found[0] == pytest.approx(ratio)


def test_a_posterior_without_prior_takes_all_as_equal():
    assert apical.Posterior([-5000.0, -5000.0]).coefficients(2) == (0.5, 0.5)
    ruled_out = apical.Posterior([0.0, 1000.0], prior=[1.0, 0.0])
    assert ruled_out.coefficients(2) == (1, 0)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: apical.Average([1.0, -1.0]), "expected none negative and not all 0"),
        (lambda: apical.Average([0.0, 0.0]), "expected none negative and not all 0"),
        (lambda: apical.Average([]), "weights is empty"),
        (lambda: apical.EMA(1.0), r"decay is 1.0; expected a number in \[0, 1\)"),
        (lambda: apical.EMA(math.nan), "decay has nan; expected finite"),
        (lambda: apical.Linear([math.inf]), "weights has inf; expected finite"),
        (lambda: apical.Linear([True]), "weights has True; expected finite"),
        (lambda: apical.TaskVectors(), "scale is None and scales is None; expected one"),
        (lambda: apical.TaskVectors(1.0, [1.0]), "expected one of them"),
        (lambda: apical.Posterior([1.0], [1.0, 1.0]), "prior has 2 numbers; expected 1"),
        (lambda: apical.Posterior([1.0], [0.0]), "not all 0"),
    ],
)
def test_numbers_that_make_no_sense(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (apical.Average([1.0, 2.0]), "weights has 2 numbers; expected 3, one for each model"),
        (apical.Linear([1.0]), "weights has 1 numbers; expected 3"),
        (apical.TaskVectors(scales=[1.0]), "expected 2, one for each model after the base"),
        (apical.Posterior([1.0]), "scores has 1 numbers; expected 3"),
    ],
)
def test_as_many_numbers_as_models(method, match):
    with pytest.raises(ValueError, match=match):
        method.coefficients(3)
