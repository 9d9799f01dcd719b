"""The greedy soup of the paper: best first, joined if the score does not drop."""

import math

import pytest
import torch

import apical


def _soup(scores, models):
    """Merge models of one number with these scores; return the result and what was asked."""
    asked = []

    def score(model):
        asked.append(round(model["w"].item(), 6))
        return scores[asked[-1]]

    return apical.merge(
        [{"w": torch.tensor([float(m)])} for m in models], apical.GreedySoup(score)
    )["w"].item(), asked


def test_what_lowers_the_score_is_left_out():
    # best first: 10, 0, 3; 10 with 0 is worse than 10 alone, 10 with 3 is better
    scores = {0: 0.8, 3: 0.7, 10: 0.9, (10 + 0) / 2: 0.85, (10 + 3) / 2: 0.95}
    merged, asked = _soup(scores, [0, 3, 10])
    assert merged == 6.5
    assert asked == [0, 3, 10, 5, 6.5]


def test_the_soup_grows_from_the_best_of_it():
    # 1 joins 9 (5), then 3 joins both: the average of three is asked for, not of two
    scores = {9: 3, 1: 2, 3: 1, 5: 4, round(13 / 3, 6): 5}
    merged, asked = _soup(scores, [1, 3, 9])
    assert merged == pytest.approx(13 / 3)
    assert asked[3:] == [5, round(13 / 3, 6)]


def test_an_equal_score_does_not_drop():
    merged, _ = _soup({1: 1.0, 3: 1.0, 2: 1.0}, [1, 3])
    assert merged == 2


def test_of_equal_models_the_first_is_the_best():
    merged, _ = _soup({1: 1.0, 3: 1.0, 2: 0.0}, [3, 1])
    assert merged == 3


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_diverged_stays_out(bad):
    merged, _ = _soup({5: bad, 1: 1.0, 3: bad}, [5, 1])
    assert merged == 1


def test_one_model_is_scored_once():
    assert _soup({7: 0.0}, [7]) == (7, [7])


def test_no_score_at_all():
    with pytest.raises(ValueError, match="score is NaN or -inf for every model"):
        _soup({1: math.nan, 2: math.nan}, [1, 2])
