"""The Triton kernels of the loss under the interpreter, against the definition in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from apical.kernels.linear_cross_entropy import _triton
from apical.kernels.linear_cross_entropy._rules import Rules

from .linear_cross_entropy_definition import PLAIN, Inputs, gradients
from .linear_cross_entropy_interpreted import (
    INTERPRETED,
    STORED,
    H,
    T,
    V,
    bfloat16_products,  # noqa: F401 - a fixture of every test
    case,
    relative,
    small_tiles,  # noqa: F401 - likewise
)

pytestmark = INTERPRETED

NAMES = "loss", "nll", "lse", "entropy", "correct", "input", "linear_weight", "linear_bias"


def check(inputs: Inputs, rules: Rules, *, loss: float = 2e-6, grads: float = 2e-6) -> None:
    """Hold both ops to the definition: relative errors over all tokens."""
    wanted = True, True, inputs.linear_bias is not None
    got = _triton.forward(*inputs, *rules, *wanted)
    values, exact = gradients(inputs, rules)
    for name, actual, true in zip(NAMES, got, (*values, *exact), strict=False):
        budget = grads if name in NAMES[5:] else loss
        assert relative(actual, true) <= budget, name
    check_backward(inputs, rules, values[2], grads)


def check_backward(inputs: Inputs, rules: Rules, lse: Tensor, budget: float) -> None:
    upstream: Any = tuple(torch.randn(len(inputs.input)) for _ in range(3))
    valid = inputs.token_weight != 0
    wanted = True, True, inputs.linear_bias is not None
    named: list[Any] = [*upstream, *inputs[:6], lse.float(), valid, *rules, *wanted]
    got = _triton.backward(*named)
    for name, actual, true in zip(
        NAMES[5:], got, gradients(inputs, rules, upstream)[1], strict=False
    ):
        assert relative(actual, true) <= budget, f"backward: {name}"


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="ragged"),
        # less than one block of anything
        pytest.param({"tokens": 5, "classes": 13, "hidden": 8, "ignored": 0.0}, id="tiny"),
        # all of the last chunk is ignored
        pytest.param({"ignored": 0.8}, id="mostly-ignored"),
        # rows that no descriptor could address
        pytest.param({"tokens": 40, "hidden": 7, "classes": 33}, id="odd"),
    ],
)
def test_shapes(shape: dict[str, Any]):
    check(case(**shape), PLAIN)


@pytest.mark.parametrize(
    ("rules", "shape"),
    [
        pytest.param(PLAIN, {"bias": True}, id="bias"),
        pytest.param(PLAIN._replace(z_loss=0.02, logit_scale=0.3), {}, id="z-scale"),
        # with so few classes that labels are equal within a token
        pytest.param(PLAIN, {"labels": 4, "classes": 6}, id="soft"),
        pytest.param(
            PLAIN._replace(softcap=2.0, logit_scale=0.7, z_loss=0.02),
            {"labels": 2, "bias": True, "spread": 4.0},
            id="softcap",
        ),
        pytest.param(PLAIN._replace(smoothing=0.2), {}, id="smoothing"),
        pytest.param(
            PLAIN._replace(smoothing=0.2, logit_scale=0.7, z_loss=0.02),
            {"labels": 3, "classes": 40, "bias": True, "weighted": True},
            id="smoothing-weights",
        ),
        # computed again, block by block
        pytest.param(
            PLAIN._replace(smoothing=0.2, softcap=2.0, z_loss=0.02, logit_scale=0.7),
            {"labels": 2, "bias": True, "weighted": True, "spread": 4.0},
            id="smoothing-softcap",
        ),
    ],
)
def test_options(rules: Rules, shape: dict[str, Any]):
    check(case(**shape), rules)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype):
    inputs = case(dtype=dtype, bias=True)
    check(inputs, PLAIN, grads=STORED[dtype])
    # a weight in another dtype is rounded to that of input
    wider = inputs._replace(linear_weight=inputs.linear_weight.float())
    for one, other in zip(
        *(_triton.forward(*x, *PLAIN, True, True, True) for x in (inputs, wider)), strict=True
    ):
        assert torch.equal(one, other)


# rows done again at their maximum, whose first exponentials overflow
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_beyond_the_range_of_exponentials(dtype: torch.dtype):
    inputs = case(spread=60.0, dtype=dtype)
    exact = gradients(inputs, PLAIN)[0][1]
    assert exact.max() > 150
    # logits of hundreds: the rounding of a logit is a relative error of its exponential
    check(inputs, PLAIN, loss=2e-5, grads=max(STORED[dtype], 5e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "margin",
    [
        # losses of 1e-3, and of 1e-14: below the rounding of any logit
        pytest.param(10.0, id="trained"),
        pytest.param(35.0, id="memorised"),
    ],
)
def test_small_losses_are_exact(margin: float, dtype: torch.dtype):
    inputs = case(dtype=torch.float64, classes=200)
    weight = torch.nn.functional.normalize(inputs.linear_weight)
    x = weight[inputs.ids[:, 0]] * margin
    inputs = inputs._replace(input=x.to(dtype), linear_weight=weight.to(dtype))
    loss = gradients(inputs, PLAIN)[0][0]
    assert 0 < loss[loss > 0].median() < 5 * math.exp(-margin / 4)
    # gradients are differences of which only the form without them leaves anything
    check(inputs, PLAIN, loss=2e-5, grads=max(STORED[dtype], 2e-5))


def test_nothing_valid_and_nothing_at_all():
    inputs = case()
    none = inputs._replace(token_weight=torch.zeros(T))
    for tensor in _triton.forward(*none, *PLAIN, True, True, True):
        assert not tensor.any()
    valid = torch.zeros(T, dtype=torch.bool)
    zeros = torch.zeros(T)
    rest = (*inputs[:6], zeros, valid)
    for tensor in _triton.backward(zeros, None, None, *rest, *PLAIN, True, True, True):
        assert not tensor.any()
    empty = case(tokens=0)
    shapes = [x.shape for x in _triton.forward(*empty, *PLAIN, True, True, True)]
    assert shapes == [(0,)] * 5 + [(0, H), (V, H), (V,)]


def test_ignored_tokens_may_hold_anything():
    inputs = case(labels=2, bias=True)
    ignored = inputs.token_weight == 0
    wild = inputs._replace(
        input=inputs.input.masked_fill(ignored[:, None], math.nan),
        ids=inputs.ids.masked_fill(ignored[:, None], -100),
        id_weight=inputs.id_weight.masked_fill(ignored[:, None], math.nan),
    )
    both = [_triton.forward(*x, *PLAIN, True, True, True) for x in (inputs, wild)]
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)
    grads: Any = [torch.where(ignored, math.nan, 1.0), None, torch.where(ignored, math.nan, 0.5)]
    ends: list[Any] = [both[0][2], ~ignored, *PLAIN, True, True, True]
    lists: list[list[Any]] = [[*grads, *x[:6], *ends] for x in (inputs, wild)]
    both = [_triton.backward(*named) for named in lists]
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_a_gradient_that_is_not_wanted_is_empty():
    inputs = case(bias=True)
    whole = _triton.forward(*inputs, *PLAIN, True, True, True)
    for wanted in ((False, False, False), (True, False, False), (False, True, False)):
        got = _triton.forward(*inputs, *PLAIN, *wanted)
        for one, other in zip(got[:5], whole[:5], strict=True):
            assert torch.equal(one, other)
        for one, other, asked in zip(got[5:], whole[5:], wanted, strict=True):
            assert torch.equal(one, other) if asked else one.shape == (0,)


def test_any_strides():
    inputs = case(bias=True)
    want = _triton.forward(*inputs, *PLAIN, True, True, True)
    strided = inputs._replace(
        input=inputs.input.t().contiguous().t(),
        linear_weight=inputs.linear_weight.repeat(1, 2)[:, :H],
        ids=inputs.ids.repeat(1, 2)[:, :1],
    )
    for one, other in zip(want, _triton.forward(*strided, *PLAIN, True, True, True), strict=True):
        assert torch.equal(one, other)


def test_a_label_outside_of_the_vocabulary_shows_as_nan():
    inputs = case(ignored=0.0)
    inputs.ids[3] = V
    loss, nll = _triton.forward(*inputs, *PLAIN, False, False, False)[:2]
    assert loss.isnan().nonzero().tolist() == nll.isnan().nonzero().tolist() == [[3]]
