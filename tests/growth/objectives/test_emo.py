"""EMO as an objective: its formula in float64, where its costs come from, and that it learns."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from apical.growth.objectives.emo import EMO


def formula(case, costs: Tensor, objective: EMO) -> Tensor:
    """Mean loss of the labelled tokens, every matrix whole."""
    logits, y = case.logits()[case.valid], case.target[case.valid]
    p = logits.softmax(-1)
    apart = 1 - F.cosine_similarity(costs[y][:, None], costs[None], dim=-1)
    apart = apart.scatter(1, y[:, None], 0.0)
    distance = (p * apart).sum(1)
    if objective.exclude_own_mass:
        distance = distance + p.gather(1, y[:, None])[:, 0].detach()
    nll = case.nll()[case.valid]
    z = objective.z_loss * case.squared_lse()[case.valid]
    if objective.mode == 2:
        return ((distance / (nll + 1e-10)).detach() * nll + distance + z).mean()
    # the released code's guard
    ratio = (nll / (distance + 1e-10)).detach()
    ratio = ratio if objective.clamp is None else ratio.clamp(max=objective.clamp)
    return ((nll + ratio * distance) / 2 + z).mean()


OBJECTIVES = [
    EMO(),
    EMO(clamp=None, z_loss=0.1),
    EMO(mode=2, exclude_own_mass=True),
    EMO(cost="current", clamp=1.0),  # one that ratios here exceed
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_formula_with_every_kind_of_head(case, objective):
    costs = objective.costs_of(case.teacher[1])
    expected = formula(case, case.weight.detach() if costs is None else costs, objective)
    found = objective(case.hidden, case.weight, case.target, costs=costs, **case.options)
    case.assert_same(found, expected)


def test_float32_takes_the_fused_loss(case):
    objective = EMO()
    costs = case.teacher[1]
    options: Any = {
        name: value.detach().float() if isinstance(value, Tensor) else value
        for name, value in case.options.items()
    }
    hidden, weight = (t.detach().float().requires_grad_() for t in (case.hidden, case.weight))
    loss = objective(hidden, weight, case.target, costs=costs.float(), **options)
    assert "Reduced" in str(loss.grad_fn)
    truth = formula(case, costs, objective)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    found = torch.autograd.grad(loss, (hidden, weight))
    wanted = torch.autograd.grad(truth, (case.hidden, case.weight))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_frozen_costs_do_not_follow_the_head():
    head = torch.randn(7, 4)
    before = head.clone()
    costs = EMO().costs_of(head)
    head.zero_()
    assert costs is not None
    assert torch.equal(costs, before)
    assert EMO(cost="current").costs_of(head) is None


def test_num_items_divides(case):
    objective, costs = EMO(), case.teacher[1]
    one = objective(case.hidden, case.weight, case.target, costs=costs)
    two = objective(case.hidden, case.weight, case.target, costs=costs, num_items=100)
    torch.testing.assert_close(two * 100, one * case.valid.sum())


def test_training_finds_a_near_word_rather_than_a_far_one():
    # two inputs, one of them labelled at random: the mass not on the label goes where it is cheap
    hidden = torch.ones(64, 1)
    target = torch.tensor([0, 1] * 32)
    costs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7], [-0.7, -0.7]])
    weight = torch.zeros(4, 1, requires_grad=True)
    step = torch.optim.SGD([weight], lr=0.5)
    for _ in range(20):
        step.zero_grad()
        EMO(mode=2)(hidden, weight, target, costs=costs).backward()
        step.step()
    near, far = weight.detach()[2].item(), weight.detach()[3].item()
    # cross-entropy would treat both alike
    assert near > far + 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": "teacher"}, "cost is 'teacher'; expected 'frozen' or 'current'"),
        ({"mode": 0}, "mode is 0; expected 1 or 2"),
        ({"clamp": -1.0}, "clamp is -1.0; expected a positive number, or None"),
        ({"z_loss": float("nan")}, "z_loss is nan; expected 0 or more"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EMO(**options)


@pytest.mark.parametrize(("cost", "given"), [("frozen", False), ("current", True)])
def test_costs_must_be_what_the_option_says(cost, given):
    x, W, y = torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=f"costs are {'given' if given else 'missing'}, but cost="):
        EMO(cost=cost)(x, W, y, costs=W if given else None)
