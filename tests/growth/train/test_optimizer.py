"""Recipes whose optimizer steps per layer or keeps moments of 8 bits."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apical.growth.per_layer import PerLayerOptimizer
from apical.growth.train import eight_bit
from apical.growth.train.optimizer import build_optimizer, moments
from apical.growth.train.recipe.schema import Optimizer, Recipe
from apical.growth.train.run import train
from apical.growth.train.stage import StageState

Outcome = tuple[list[dict[str, Any]], bytes]
Read = Callable[[Path], Outcome]

pytestmark = pytest.mark.usefixtures("quick_report")


def _with(make_recipe: Callable[..., Recipe], **optimizer: Any) -> Recipe:
    stages = make_recipe().resolved()["stages"]
    for stage in stages:
        stage["optimizer"] |= optimizer
    return make_recipe(stages=stages)


def test_per_layer_is_the_same_run(
    make_recipe: Callable[..., Recipe], tmp_path: Path, outcome: Read
) -> None:
    whole = outcome(train(_with(make_recipe, clip=None), output=tmp_path / "whole"))
    recipe = _with(make_recipe, clip=None, per_layer=True)
    records, weights = outcome(train(recipe, output=tmp_path / "run"))
    assert weights == whole[1]
    for ours, theirs in zip(records, whole[0], strict=True):
        if "grad_norm" in ours:
            # the norm of norms sums in another order
            assert math.isclose(ours.pop("grad_norm"), theirs.pop("grad_norm"), rel_tol=1e-5)
        assert ours == theirs


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_per_layer_resumes(
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcome: Read,
    kind: str,
) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    stages = _with(make_recipe, clip=None, per_layer=True).resolved()["stages"]
    for stage in stages:
        stage["optimizer"]["kind"] = kind
    # moments of 8 bits cannot grow
    stages[1]["model"]["optimizer"] = "reset"
    recipe = make_recipe(stages=stages)
    whole = outcome(train(recipe, output=tmp_path / "whole"))
    step, calls = StageState.step, []

    def killed(self: StageState) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as broken:
        broken.setattr(StageState, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, output=tmp_path / "run")
    assert outcome(train(recipe, output=tmp_path / "run", resume=True)) == whole


def test_eight_bit_moments_take_a_quarter() -> None:
    pytest.importorskip("bitsandbytes")
    model = nn.Linear(512, 512, bias=False)
    sizes = {}
    for kind in ("adamw", "adamw8bit"):
        optimizer = build_optimizer(model, Optimizer(kind=kind), peak=1e-3)
        sizes[kind] = sum(t.nbytes for t in moments(model, optimizer)["weight"].values())
    assert sizes["adamw8bit"] < 0.3 * sizes["adamw"]


def test_eight_bit_state_changes_no_weight_and_has_no_moment() -> None:
    pytest.importorskip("bitsandbytes")
    model = nn.Linear(128, 64)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, Optimizer(kind="adamw8bit"), peak=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    # as if it were the first: two steps of two optimizers, one of which had its state made
    make: Any = type(optimizer)
    fresh = make(optimizer.param_groups)
    x = torch.randn(5, 128)
    model(x).square().sum().backward()
    optimizer.step()
    ours = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    fresh.step()
    assert all(torch.equal(p, ours[name]) for name, p in model.named_parameters())


def test_neither_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bit, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the package bitsandbytes or torchao: pip install"):
        build_optimizer(nn.Linear(2, 2), Optimizer(kind="adamw8bit"), peak=1e-3)


def test_per_layer_has_a_state_to_save_before_its_first_step() -> None:
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(model, Optimizer(per_layer=True, clip=None), peak=1e-3)
    assert isinstance(optimizer, PerLayerOptimizer)
    assert [set(state) for state in moments(model, optimizer).values()] == [
        {"step", "exp_avg", "exp_avg_sq"}
    ] * 2


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        pytest.param(
            {"kind": "adamw8bit"}, {}, "the moments are those of adamw8bit, not adamw", id="other"
        ),
        pytest.param(
            {"kind": "adamw8bit"},
            {"kind": "adamw8bit"},
            "moments of adamw8bit cannot grow",
            id="grown",
        ),
    ],
)
def test_moments_that_cannot_be_kept(
    make_recipe: Callable[..., Recipe], first: dict, second: dict, message: str
) -> None:
    stages = make_recipe().resolved()["stages"]
    stages[0]["optimizer"] |= first
    stages[1]["optimizer"] |= second
    with pytest.raises(ValueError, match=f"{message}; write reset"):
        make_recipe(stages=stages)


def test_clipping_needs_all_gradients(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match="is 1, which needs all gradients at once; per_layer"):
        _with(make_recipe, per_layer=True)
