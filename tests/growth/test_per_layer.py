"""Steps in the backward pass: the same result as steps after it, with few gradients alive."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from apical.growth.per_layer import PerLayerOptimizer

GRADIENTS = 4  # micro-batches


def _model(tied: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8) for _ in range(5)]
    if tied:
        layers[3].weight = layers[0].weight
    return nn.Sequential(*layers)


def _groups(model: nn.Module) -> list[dict]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def _batches(steps: int, parts: int) -> list[list[Tensor]]:
    torch.manual_seed(1)
    return [[torch.randn(3, 8) for _ in range(parts)] for _ in range(steps)]


def _train(model: nn.Module, optimizer: Optimizer, batches: list[list[Tensor]]) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for parts in batches:
        for x in parts:
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


MAKE = {
    # moments and a count of steps
    "adamw": lambda groups: AdamW(groups, lr=1e-2),
    "fused": lambda groups: AdamW(groups, lr=1e-2, fused=True),
    # weight decay enters the gradient
    "adam": lambda groups: Adam(groups, lr=1e-2),
    "momentum": lambda groups: SGD(groups, lr=1e-2, momentum=0.9),
    # no state at all
    "sgd": lambda groups: SGD(groups, lr=1e-2),
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("parts", [1, GRADIENTS])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_steps_after_the_backward_pass(kind: str, parts: int, tied: bool) -> None:
    batches = _batches(5, parts)
    expected, model = _model(tied), _model(tied)
    _train(expected, MAKE[kind](_groups(expected)), batches)
    _train(model, PerLayerOptimizer(_groups(model), MAKE[kind], accumulation=parts), batches)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_short_last_accumulation_is_stepped_by_step() -> None:
    batches = [*_batches(2, 4), *_batches(1, 3)]
    expected, model = _model(), _model()
    _train(expected, MAKE["adamw"](_groups(expected)), batches)
    _train(model, PerLayerOptimizer(_groups(model), MAKE["adamw"], accumulation=4), batches)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_one_gradient_at_a_time_is_alive() -> None:
    model, alive = _model(), []
    # before the step's own hook, in whose end the gradient is freed
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    PerLayerOptimizer(_groups(model), MAKE["adamw"])
    model(torch.randn(3, 8)).sum().backward()
    assert alive == [1] * 10


def test_accumulation_does_not_step_early() -> None:
    model = _model()
    before = [p.clone() for p in model.parameters()]
    PerLayerOptimizer(_groups(model), MAKE["adamw"], accumulation=2)
    model(torch.randn(3, 8)).sum().backward()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    model(torch.randn(3, 8)).sum().backward()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_state_goes_through_a_state_dict() -> None:
    batches = _batches(6, 1)
    whole, first, second = _model(), _model(), _model()
    _train(whole, MAKE["adamw"](_groups(whole)), batches)
    before = PerLayerOptimizer(_groups(first), MAKE["adamw"])
    schedule = torch.optim.lr_scheduler.LambdaLR(before, lambda step: 1 / (1 + step))
    for (x,) in batches[:3]:
        first(x).square().mean().backward()
        before.step()
        schedule.step()
    second.load_state_dict(first.state_dict())
    after = PerLayerOptimizer(_groups(second), MAKE["adamw"])
    resumed = torch.optim.lr_scheduler.LambdaLR(after, lambda step: 1 / (1 + step))
    resumed.load_state_dict(schedule.state_dict())
    # after the schedule, which sets the learning rate of its first step
    after.load_state_dict(before.state_dict())
    for (x,) in batches[3:]:
        second(x).square().mean().backward()
        after.step()
        resumed.step()
    for ours, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_norm_is_that_of_all_gradients() -> None:
    expected, model = _model(), _model()
    x = torch.randn(3, 8)
    expected(x).sum().backward()
    norm = nn.utils.clip_grad_norm_(expected.parameters(), float("inf"))
    optimizer = PerLayerOptimizer(_groups(model), MAKE["sgd"])
    model(x).sum().backward()
    torch.testing.assert_close(optimizer.pop_grad_norm(), norm)
    assert optimizer.pop_grad_norm() == 0


def test_frozen_and_unused_parameters_stay() -> None:
    model = _model()
    first = next(model.parameters()).requires_grad_(False)
    unused = nn.Parameter(torch.ones(2))
    groups = [*_groups(model), {"params": [unused]}]
    frozen = first.clone()
    _train(model, PerLayerOptimizer(groups, MAKE["adamw"]), _batches(2, 1))
    assert torch.equal(first, frozen)
    assert torch.equal(unused, torch.ones(2))


def test_removed_hooks_leave_gradients() -> None:
    model = _model()
    optimizer = PerLayerOptimizer(_groups(model), MAKE["adamw"])
    optimizer.remove()
    model(torch.randn(3, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_refusals() -> None:
    model = _model()
    with pytest.raises(ValueError, match="accumulation must be at least 1, got 0"):
        PerLayerOptimizer(_groups(model), MAKE["adamw"], accumulation=0)
    with pytest.raises(ValueError, match="takes no closure; call backward"):
        PerLayerOptimizer(_groups(model), MAKE["adamw"]).step(lambda: 0.0)
