"""The spherical family as objectives: formulas in float64, invariance, and that they learn."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from apical.growth.objectives.spherical import (
    LogSphericalSoftmax,
    LogTaylorSoftmax,
    SphericalZLoss,
)

OBJECTIVES = [
    SphericalZLoss(sharpness=1.5, location=1.0),
    LogTaylorSoftmax(),
    LogSphericalSoftmax(offset=0.3),
]


def formula(case, objective: object) -> Tensor:
    """Mean loss of the labelled tokens, from all logits."""
    o, y = case.logits()[case.valid], case.target[case.valid][:, None]
    if isinstance(objective, SphericalZLoss):
        z = (o - o.mean(1, keepdim=True)) / o.std(1, correction=0, keepdim=True)
        return (F.softplus(1.5 * (1.0 - z.gather(1, y))) / 1.5).mean()
    f = 1 + o + o**2 / 2 if isinstance(objective, LogTaylorSoftmax) else o**2 + 0.3
    return -(f.gather(1, y)[:, 0] / f.sum(1)).log().mean()


@pytest.fixture
def linear(case):
    """A head of any kind that is linear."""
    if "softcap" in case.options:
        case.options.pop("softcap")
    return case


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_formula_with_every_kind_of_linear_head(linear, objective):
    found = objective(linear.hidden, linear.weight, linear.target, **linear.options)
    linear.assert_same(found, formula(linear, objective))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_float32_needs_no_logits(linear, objective):
    options: Any = {
        name: value.detach().float() if isinstance(value, Tensor) else value
        for name, value in linear.options.items()
    }
    leaves = [t.detach().float().requires_grad_() for t in (linear.hidden, linear.weight)]
    loss = objective(*leaves, linear.target, **options)
    truth = formula(linear, objective)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    found = torch.autograd.grad(loss, leaves)
    wanted = torch.autograd.grad(truth, (linear.hidden, linear.weight))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_the_z_loss_ignores_scale_and_shift(linear):
    objective = SphericalZLoss(sharpness=1.5, location=1.0)
    plain = objective(linear.hidden, linear.weight, linear.target)
    scaled = objective(linear.hidden, linear.weight, linear.target, logit_scale=7.0)
    shifted = objective(
        linear.hidden, linear.weight, linear.target, linear_bias=torch.full((13,), 100.0).double()
    )
    torch.testing.assert_close(scaled, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(shifted, plain, rtol=1e-9, atol=0)


# what grows with the probability of a word: the likelihoods know no sign, about -1 and about 0
LIKELY: list[Callable[[Tensor], Tensor]] = [
    lambda o: o,
    lambda o: (o + 1).abs(),
    lambda o: o.abs(),
]


@pytest.mark.parametrize(("objective", "likely"), list(zip(OBJECTIVES, LIKELY, strict=True)))
def test_training_finds_the_labels(objective, likely):
    # four kinds of input, each with a word of its own among nine
    hidden, target = torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8)
    weight = (torch.randn(9, 4) * 0.1).requires_grad_()
    step = torch.optim.Adam([weight], lr=0.1)
    for _ in range(60):
        step.zero_grad()
        objective(hidden, weight, target).backward()
        step.step()
    assert torch.equal(likely(hidden @ weight.t()).argmax(1), target)


def test_num_items_divides(linear):
    objective = LogTaylorSoftmax()
    one = objective(linear.hidden, linear.weight, linear.target)
    two = objective(linear.hidden, linear.weight, linear.target, num_items=100)
    torch.testing.assert_close(two * 100, one * linear.valid.sum())


def test_a_cap_is_refused():
    x, W, y = torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"softcap is 30\.0, but SphericalZLoss takes linear"):
        SphericalZLoss()(x, W, y, softcap=30.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SphericalZLoss(sharpness=0.0), "sharpness is 0.0; expected a positive number"),
        (lambda: SphericalZLoss(location=float("nan")), "location is nan; expected a finite"),
        (lambda: LogSphericalSoftmax(offset=0.0), "offset is 0.0; expected a positive number"),
    ],
    ids=["sharpness", "location", "offset"],
)
def test_bad_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
