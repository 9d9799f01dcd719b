"""The law of when to grow: the authors' examples, the range, the accounting, the command."""

import math

import pytest

from apical import cli
from apical.growth.growth_law import plan_growth, stacking_tokens

# README of github.com/tongxuluo/prts: (N, D, d), d printed in billions with two digits
EXAMPLES = [
    pytest.param(8e9, 15e12, 6.58, id="llama 3 8b: the most tokens"),
    pytest.param(7e9, 2e12, 11.11, id="llama 2 7b: the smallest"),
    pytest.param(13e9, 2e12, 15.84, id="llama 2 13b"),
    pytest.param(70e9, 2e12, 42.48, id="llama 2 70b: the largest"),
]


@pytest.mark.parametrize(("params", "tokens", "billions"), EXAMPLES)
def test_the_authors_examples(params, tokens, billions):
    assert round(stacking_tokens(params, 6 * params * tokens) / 1e9, 2) == billions
    found = plan_growth(params, tokens=tokens)
    assert round(found.growth_tokens / 1e9, 2) == billions
    assert found.factor == 4


def test_a_budget_is_six_per_parameter_and_token():
    by_tokens, by_flops = plan_growth(1.1e9, tokens=1e11), plan_growth(1.1e9, flops=6.6e20)
    assert by_flops.tokens == pytest.approx(1e11, rel=1e-12)
    assert by_flops.growth_tokens == pytest.approx(by_tokens.growth_tokens, rel=1e-9)


def test_flops_are_those_of_both_models():
    found = plan_growth(1.1e9, tokens=1e11, factor=2, small_params=6e8)
    d = found.growth_tokens
    assert found.scratch_flops == pytest.approx(6.6e20, rel=1e-12)
    assert found.small_flops == pytest.approx(6 * 6e8 * d, rel=1e-12)
    assert found.large_flops == pytest.approx(6 * 1.1e9 * (1e11 - d), rel=1e-12)
    # in closed form, written down independently: the small model is cheaper for d of D tokens
    assert found.saved == pytest.approx(d / 1e11 * (1 - 6 / 11), rel=1e-9)


def test_the_small_model_has_its_share_of_the_parameters_unless_told():
    assert plan_growth(1.2e9, tokens=1e11).small_params == 3e8
    assert plan_growth(1.2e9, tokens=1e11, factor=3).small_params == 4e8


@pytest.mark.parametrize(
    ("params", "tokens", "factor", "words"),
    [
        pytest.param(1.1e9, 1e11, 4, (), id="one of the paper's own runs"),
        pytest.param(3e9, 3e11, 2, (), id="edge of the fit, edge of the factors"),
        pytest.param(2e8, 1e12, 4, ("outside of the fit",), id="fewer parameters"),
        pytest.param(7e9, 2e12, 4, ("examples up to 70 B",), id="only the authors' own examples"),
        pytest.param(2e11, 1e13, 4, ("outside of the fit", "were tried"), id="more of both"),
        pytest.param(1.1e9, 1e11, 8, ("factor 8",), id="factor above the flat region"),
    ],
)
def test_what_was_not_tried_is_said(params, tokens, factor, words):
    notes = plan_growth(params, tokens=tokens, factor=factor).notes
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param({"tokens": None}, "one of them", id="no budget"),
        pytest.param({"flops": 1e21}, "one of them", id="two budgets"),
        pytest.param({"params": -1.0}, "params is -1", id="negative"),
        pytest.param({"params": math.nan}, "params is nan", id="not a number"),
        pytest.param({"tokens": math.inf}, "tokens is inf", id="endless"),
        pytest.param({"tokens": None, "flops": 0.0}, "flops is 0", id="no compute"),
        pytest.param({"factor": 1}, "at least 2", id="no growth"),
        pytest.param({"factor": True}, "at least 2", id="bool is no factor"),
        pytest.param({"small_params": 1.1e9}, "fewer than params", id="small is not smaller"),
        pytest.param({"params": 2e6, "tokens": 1e6}, "behind the end", id="the size of a demo"),
    ],
)
def test_what_is_refused(arguments, words):
    given = {"params": 1.1e9, "tokens": 1e11} | arguments
    with pytest.raises(ValueError, match=words):
        plan_growth(given.pop("params"), **given)


def test_the_command_prints_the_plan(capsys):
    assert cli.main(["plan", "growth", "--params", "7e9", "--tokens", "2e12"]) == 0
    out = capsys.readouterr().out
    # small: 7e9 / 4; FLOPs from scratch: 6 N D; saved: 11.11e9 / 2e12 * 3 / 4
    for word in ("d = 11.11 B", "1.75 B", "stack --factor 4", "8.4e+22 from scratch", "0.42%"):
        assert word in out
    assert "extrapolated" in out


def test_the_command_takes_flops_and_a_factor(capsys):
    options = ["--params", "1.1e9", "--flops", "6.6e20", "--factor", "2", "--small-params", "6e8"]
    assert cli.main(["plan", "growth", *options]) == 0
    out = capsys.readouterr().out
    assert "100 B tokens" in out
    assert "1/2 of the layers, 600 M" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--params", "7e9"], "expected one of them", id="no budget"),
        pytest.param(["--tokens", "2e12"], "--params is missing", id="no size"),
    ],
)
def test_the_command_says_what_is_missing(capsys, options, words):
    assert cli.main(["plan", "growth", *options]) == 2
    assert words in capsys.readouterr().err
