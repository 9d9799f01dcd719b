"""Stages whose layers are replaced: what they train, cost, save and hand on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import apical
from apical.growth.sparse import SparseLowRank, SparseLowRankLinear, replaced, sparsify
from apical.growth.train import trainer
from apical.growth.train.compare import scratch_recipe
from apical.growth.train.flops import cost_of_config
from apical.growth.train.model import model_of_config
from apical.growth.train.optimizer import build_optimizer
from apical.growth.train.recipe.errors import describe
from apical.growth.train.recipe.schema import Optimizer, Recipe
from apical.growth.train.results.metrics import read_metrics
from apical.growth.train.run import train
from apical.growth.train.stage import StageState

pytestmark = pytest.mark.usefixtures("quick_report")

SLTRAIN = {"sparse_low_rank": {"rank": 0.25, "density": 0.1, "init": "sltrain"}}
PREVIOUS = {"from": "previous", "optimizer": "reset"}
# sparse from scratch; the same layers with their moments; dense, which then grows
STAGES: list[dict[str, Any]] = [
    {"sparsity": SLTRAIN},
    {"name": "continue", "model": {"from": "previous"}, "objective": {"z_loss": 1e-3}},
    {"name": "dense", "sparsity": "dense", "model": PREVIOUS | {"grow": {"stack": {"factor": 2}}}},
]


@pytest.fixture
def make(make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """Return a function that makes a recipe of stages, each with its changes of the first."""

    def build(*stages: dict[str, Any]) -> Recipe:
        first = make_recipe().resolved()["stages"][0]
        return make_recipe(stages=[first | stage for stage in stages])

    return build


@pytest.fixture
def recipe(make: Callable[..., Recipe]) -> Recipe:
    return make(*STAGES)


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


def kill_and_resume(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, root: Path, owner: Any, name: str, *, nth: int
) -> None:
    """Run a recipe until the nth call of a function, and then from its last checkpoint."""
    function, calls = getattr(owner, name), iter(range(1, 100))

    def broken(*args: Any, **options: Any) -> Any:
        if next(calls) == nth:
            raise Killed
        return function(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        with pytest.raises(Killed):
            train(recipe, output=root)
    train(recipe, output=root, resume=True)


@pytest.mark.parametrize(
    ("owner", "name", "nth"),
    [
        pytest.param(StageState, "step", 4, id="within-the-sparse-stage"),
        pytest.param(trainer, "first_model", 2, id="before-the-layers-are-handed-on"),
        pytest.param(StageState, "step", 9, id="with-kept-moments"),
        pytest.param(trainer, "first_model", 3, id="before-the-export"),
        pytest.param(StageState, "step", 14, id="after-the-export"),
    ],
)
def test_killed_and_resumed_is_the_same_run(
    recipe, tmp_path, monkeypatch, outcome, owner, name, nth
):
    expected = outcome(train(recipe, output=tmp_path / "whole"))
    kill_and_resume(monkeypatch, recipe, tmp_path / "run", owner, name, nth=nth)
    assert outcome(tmp_path / "run") == expected


@pytest.mark.parametrize(
    "rule",
    [
        # the mask is that of the weights that are drawn when the stage begins: only saved
        pytest.param({"masked": {"sparsity": 0.5}}, id="masked"),
        pytest.param({"monarch": {"blocks": 4}}, id="monarch"),
    ],
)
def test_other_layers_resume_too(make, tmp_path, monkeypatch, outcome, rule):
    recipe = make({"sparsity": rule})
    expected = outcome(train(recipe, output=tmp_path / "whole"))
    kill_and_resume(monkeypatch, recipe, tmp_path / "run", StageState, "step", nth=4)
    assert outcome(tmp_path / "run") == expected


def test_a_sparse_run_leaves_a_model_for_load(make, tmp_path):
    root = train(make(*STAGES[:2]), output=tmp_path / "run")
    model = apical.load(root / "checkpoint")
    assert len(replaced(model)) == 7
    weights = load_file(root / "checkpoint" / "model.safetensors")
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    # trained: SLTrain begins with zeros here
    assert model.model.layers[0].mlp.up_proj.b.abs().max() > 0
    # the config of a checkpoint is that of the model: what it is resumed with is what is saved
    steps = sorted((root / "checkpoints").glob("step-*")) or sorted(root.glob("**/step-*"))
    resumed = json.loads((steps[-1] / "config.json").read_text())["apical"]
    assert resumed == model.config.apical


def test_a_dense_run_leaves_a_stock_model(recipe, tmp_path):
    root = train(recipe, output=tmp_path / "run")
    load: Any = AutoModelForCausalLM.from_pretrained
    model, found = load(root / "checkpoint", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert model.config.num_hidden_layers == 2
    assert "apical" not in model.config.to_dict()
    made = [r["made"] for r in read_metrics(root / "metrics.jsonl") if r["kind"] == "stage"]
    assert "7 of its layers are sparse, by SparseLowRank(" in made[0]
    assert "7 of its layers are sparse\n" in made[1]
    assert "sparse" not in made[2]


def test_export_keeps_the_function(make, tmp_path):
    # the loss before a dense stage is that after the sparse one, to rounding
    stages = [{"sparsity": SLTRAIN}, {"name": "dense", "sparsity": "dense", "model": PREVIOUS}]
    root = train(make(*stages), output=tmp_path / "run")
    evals = [r for r in read_metrics(root / "metrics.jsonl") if r["kind"] == "eval"]
    after, before = evals[1]["loss/prose"], evals[2]["loss/prose"]
    assert abs(after - before) < 1e-5


def test_a_stage_begins_with_a_sparse_directory(make, tmp_path):
    first = train(make(STAGES[0]), output=tmp_path / "first")
    directory = {"from": str(first / "checkpoint")}
    second = train(make({"model": directory}), output=tmp_path / "second")
    assert len(replaced(apical.load(second / "checkpoint"))) == 7
    third = train(make({"model": directory, "sparsity": "dense"}), output=tmp_path / "third")
    assert "apical" not in AutoConfig.from_pretrained(third / "checkpoint").to_dict()


def test_the_teacher_is_the_dense_model_before(make, tmp_path, monkeypatch, outcome):
    salt = {"kind": "salt", "teacher": "previous", "top_k": 4, "transition": 0.5}
    stages = [{}, {"name": "student", "model": PREVIOUS, "sparsity": SLTRAIN, "objective": salt}]
    recipe = make(*stages)
    expected = outcome(train(recipe, output=tmp_path / "whole"))
    kill_and_resume(monkeypatch, recipe, tmp_path / "run", StageState, "step", nth=8)
    assert outcome(tmp_path / "run") == expected


def test_flops_are_those_of_the_layers(make):
    config = AutoConfig.for_model(**make({}).stages[0].model.config | {"vocab_size": 280})
    dense = cost_of_config(config)
    model = sparsify(model_of_config(config), SparseLowRank(rank=8, density=0.1))
    saved = 0
    for n, m in [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]:
        saved += n * m - 8 * (n + m) - int(0.1 * n * m)
    assert cost_of_config(model.config).weights == dense.weights - saved
    assert cost_of_config(model.config).attention == dense.attention


def test_stored_entries_decay_like_the_matrices_that_they_are_in(make):
    config = AutoConfig.for_model(**make({}).stages[0].model.config | {"vocab_size": 280})
    model = sparsify(model_of_config(config), SparseLowRank(rank=8, density=0.1))
    decayed, plain = build_optimizer(model, Optimizer(), peak=1e-3).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p].rpartition("norm.")[2] for p in plain["params"]} == {"weight"}
    values = [name for p in decayed["params"] if (name := names[p]).endswith(".values")]
    assert len(values) == 7


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"sparsity": {"sparse_lowrank": {}}}], "did you mean 'sparse_low_rank'?"),
        (
            [{"sparsity": {"sparse_low_rank": {"rnk": 4}}}],
            "unknown key; did you mean 'rank'?",
        ),
        ([{"sparsity": {"sparse_low_rank": {"density": "much"}}}], "expected a number, got 'much'"),
        ([{"sparsity": {"sparse_low_rank": {}, "low_rank": {}}}], "names 2 rules, expected one"),
        ([{"sparsity": "sparse"}], "unknown value 'sparse'; expected a rule such as"),
        ([{"sparsity": {"low_rank": 4}}], "expected a mapping of options, got 4"),
        ([{"sparsity": "dense"}], "is dense, but the model has no sparse layers before"),
        (
            [
                {"sparsity": SLTRAIN},
                {"name": "next", "sparsity": "dense", "model": {"from": "previous"}},
            ],
            "is keep, but `sparsity` makes parameters that have no moments; write reset",
        ),
        (
            [{}, {"name": "next", "sparsity": SLTRAIN, "model": {"from": "previous"}}],
            "is keep, but `sparsity` makes",
        ),
        (
            [
                {"sparsity": SLTRAIN},
                {"name": "next", "model": PREVIOUS | {"grow": {"stack": {"factor": 2}}}},
            ],
            "has sparse layers, which cannot grow; add `sparsity: dense`",
        ),
    ],
    ids=["rule", "option", "value", "two", "word", "options", "dense", "keep", "keep-rule", "grow"],
)
def test_mistakes(make, stages, message):
    with pytest.raises(ValidationError) as caught:
        make(*stages)
    place, text = describe(caught.value.errors()[0])
    assert message in text
    assert place[0] == "stages"


def test_what_the_model_refuses_is_said_before_training(make, tmp_path):
    recipe = make({"sparsity": {"sparse_low_rank": {"rank": 40}}})
    with pytest.raises(ValueError, match=r"^stages\[0\]\.sparsity: .*rank is 40; expected"):
        train(recipe, output=tmp_path / "run")
    assert not Path(tmp_path / "run").exists()


def test_an_integer_is_a_rank_and_a_fraction_a_share(make):
    for rank in (4, 0.5):
        rule = make({"sparsity": {"sparse_low_rank": {"rank": rank}}}).stages[0].rule()
        assert isinstance(rule, SparseLowRank)
        assert (rule.rank, type(rule.rank)) == (rank, type(rank))


def test_the_arm_from_scratch_has_the_layers_of_the_grown_model(make, tmp_path):
    grown = {"name": "grow", "sparsity": SLTRAIN}
    recipe = make({}, grown | {"model": PREVIOUS | {"grow": {"stack": {"factor": 2}}}})
    root = train(recipe, output=tmp_path / "run")
    scratch = scratch_recipe(recipe, read_metrics(root / "metrics.jsonl"))
    assert scratch.stages[0].sparsity == SLTRAIN


def test_a_run_from_explicit_positions_resumes(make, tmp_path, monkeypatch, outcome):
    # they are in the checkpoint alone: nothing draws them again
    first = train(make({}), output=tmp_path / "first")
    model = apical.load(first / "checkpoint")
    old = model.model.layers[0].mlp.up_proj
    positions = torch.arange(7, 900, 31)
    model.model.layers[0].mlp.up_proj = SparseLowRankLinear.from_dense(
        old, rank=4, alpha=1.0, support="explicit", positions=positions
    )
    sparsify(model, SparseLowRank(include=("*q_proj",), rank=4))
    model.save_pretrained(tmp_path / "explicit")
    salt = {"kind": "salt", "teacher": "previous", "top_k": 4, "transition": 0.5}
    stages = [
        {"model": {"from": str(tmp_path / "explicit")}},
        {"name": "next", "model": {"from": "previous"}, "objective": salt},
    ]
    recipe = make(*stages)
    expected = outcome(train(recipe, output=tmp_path / "whole"))
    kill_and_resume(monkeypatch, recipe, tmp_path / "run", StageState, "step", nth=8)
    assert outcome(tmp_path / "run") == expected
    last = apical.load(tmp_path / "run" / "checkpoint").model.layers[0].mlp.up_proj
    assert torch.equal(last.support.flat(), positions)
