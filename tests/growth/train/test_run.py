"""The main job, end to end on a tiny recipe, and what it does with a user's mistakes."""

import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import apical
from apical.growth.train import trainer
from apical.growth.train.checkpoint import list_checkpoints
from apical.growth.train.inputs import Inputs
from apical.growth.train.model import save_model
from apical.growth.train.optimizer import build_optimizer, build_schedule, moments
from apical.growth.train.recipe.schema import InfiniteSchedule, Optimizer, Recipe
from apical.growth.train.results.metrics import Metrics, read_metrics, truncate_metrics
from apical.growth.train.run import train
from apical.growth.train.stage import StageState

pytestmark = pytest.mark.usefixtures("quick_report")


def test_three_stages(finished: Path):
    records = read_metrics(finished / "metrics.jsonl")
    kinds = [record["kind"] for record in records]
    stage = ["stage", "eval", "train", "train", "eval"]
    assert kinds == ["start", *(stage * 3), "final"]
    # pre-training: the ends of a logging window and of the stage; 5, 4 and 4 steps in all
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert steps == [3, 5, 8, 9, 12, 13]
    pretrain = [record for record in records if record.get("stage") == "pretrain"]
    assert pretrain[-1]["loss/prose"] < pretrain[1]["loss/prose"] - 0.5
    # growth keeps the text but not quite the function; the model has twice the layers
    parameters = [record["parameters"] for record in records if record["kind"] == "stage"]
    assert parameters[1] == parameters[2] > parameters[0]
    mixed = sum((r["tokens_by_source"].get("code", 0) for r in records if r["kind"] == "train"), 0)
    assert 0 < mixed < 4 * 96


def test_progress_and_result_are_shown_and_bits_repeat(
    tiny_recipe: Recipe,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    outcome: Any,
):
    assert outcome(train(tiny_recipe, output=tmp_path / "run")) == outcome(finished)
    out = capsys.readouterr()
    final = read_metrics(finished / "metrics.jsonl")[-1]
    assert re.search(rf"continue +code .* {final['loss/code']:.4f} ", out.out)
    # where there is no terminal: a line every log_every steps of a stage, and after its last
    lines = [line.split("  loss")[0] for line in out.err.splitlines() if " left" in line]
    assert lines[:2] == ["pretrain 3/5", "pretrain 5/5"]
    assert lines[2:] == ["grow 3/4", "grow 4/4", "continue 3/4", "continue 4/4"]
    assert re.search(r"continue 4/4  loss \d\.\d{3}, [\d,]+ tokens/s  100%, 00:00 left", out.err)


def test_stage_counts_what_it_spends(finished: Path):
    records = read_metrics(finished / "metrics.jsonl")
    train_records = [record for record in records if record["kind"] == "train"]
    by_source = [sum(record["tokens_by_source"].values()) for record in train_records]
    assert sum(by_source) == train_records[-1]["tokens"] == records[-1]["tokens"]
    # a batch may be smaller than batch_tokens, never larger, and at most a piece is missing
    assert 13 * (96 - 24) < records[-1]["tokens"] <= 13 * 96
    # 6 N T is all but the attention, which is small at this length
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 280 * 32
    tokens = train_records[-1]["tokens"] - train_records[1]["tokens"]
    spent = train_records[-1]["flops"] - train_records[1]["flops"]
    assert 6 * weights * tokens < spent < 6.6 * weights * tokens


def test_final_model_is_plain(tiny_recipe: Recipe, finished: Path):
    model: Any = AutoModelForCausalLM.from_pretrained(finished / "checkpoint").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "checkpoint")
    assert model.config.num_hidden_layers == 2
    assert "apical" not in (finished / "checkpoint" / "config.json").read_text()
    start = tokenizer("the plant", return_tensors="pt").input_ids
    made = model.generate(start, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert made.shape[1] > start.shape[1]
    assert tokenizer.decode(made[0]).startswith("the plant")
    # it is the model that was evaluated last
    records = read_metrics(finished / "metrics.jsonl")
    (batch,) = Inputs(tiny_recipe).held_out(tiny_recipe.stages[-1])["code"].batches
    loss = model(**batch.model_inputs(packed=False)).loss.item()
    assert loss == pytest.approx(records[-1]["loss/code"], rel=1e-6)


def test_other_seed_other_weights(
    make_recipe: Callable[..., Recipe], finished: Path, tmp_path: Path, outcome: Any
):
    (records, weights), (others, other) = (
        outcome(finished),
        outcome(train(make_recipe(seed=1), output=tmp_path / "run")),
    )
    assert weights != other
    # the first loss is before any step: the initial weights differ as well
    assert records[2]["loss/prose"] != others[2]["loss/prose"]


def test_kernels_change_no_loss(make_recipe: Callable[..., Recipe], tmp_path: Path):
    losses = []
    for kernels in (True, False):
        stages = make_recipe().resolved()["stages"]
        for stage in stages:
            stage |= {"kernels": kernels, "objective": {"z_loss": 0.0}}
        root = train(make_recipe(stages=stages, log_every=1), output=tmp_path / f"{kernels}")
        records = read_metrics(root / "metrics.jsonl")
        losses.append([v for r in records for k, v in r.items() if k.startswith("loss")])
        made = [record["made"] for record in records if record["kind"] == "stage"]
        assert all(("varlen_attention, no attention across" in text) == kernels for text in made)
    assert len(losses[0]) > 30
    # float32, after up to 13 steps of AdamW on rounding errors that differ
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "stock"])
def test_packed_gradients_are_those_of_single_documents(tiny_recipe: Recipe, kernels: bool):
    batch = Inputs(tiny_recipe).stream(tiny_recipe.stages[2], seed=3).next()
    lengths = batch.cu_seqlens.diff().tolist()
    assert len(set(lengths)) > 2
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": 280}
    config = AutoConfig.for_model(**(tiny_recipe.stages[0].model.config or {}) | sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    apical.use_kernels(model, attention=kernels, loss=kernels)
    inputs = batch.model_inputs(packed=kernels)
    if kernels:
        model(**inputs).loss.backward()
    else:
        # the stock loss rounds logits to float32
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
        cross_entropy(logits[0, :-1], batch.labels[0, 1:]).backward()
    together = {name: p.grad for name, p in model.named_parameters()}
    apical.use_kernels(model, attention=False, loss=False).zero_grad()
    for ids in batch.input_ids[0].split(lengths):
        logits = model(input_ids=ids[None]).logits
        total = cross_entropy(logits[0, :-1], ids[1:], reduction="sum")
        (total / (sum(lengths) - len(lengths))).backward()
    alone = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


def test_moments_are_grown_or_reset(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, Any] = {}
    step = StageState.step

    def spy(self: StageState) -> Any:
        if self.plan.index == 1 and self.step_in_stage == 0:
            seen["moments"] = {
                name: {key: value.clone() for key, value in state.items()}
                for name, state in moments(self.model, self.optimizer).items()
            }
        return step(self)

    monkeypatch.setattr(StageState, "step", spy)
    stages = make_recipe().resolved()["stages"][:2]
    for choice in ("keep", "reset"):
        stages[1]["model"]["optimizer"] = choice
        train(make_recipe(stages=stages), output=tmp_path / choice)
        first, second = (
            seen["moments"][f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1)
        )
        assert torch.equal(first["exp_avg"], second["exp_avg"])
        assert first["exp_avg"].any() == (choice == "keep")
        assert second["exp_avg_sq"].any() == (choice == "keep")
        assert first["step"] == (5 if choice == "keep" else 0)


def test_a_checkpoint_directory_as_start(
    make_recipe: Callable[..., Recipe], finished: Path, tmp_path: Path
):
    stages = make_recipe().resolved()["stages"][:1]
    stages[0]["model"] = {"from": str(finished / "checkpoint")}
    tokenizer = {"path": str(finished / "checkpoint")}
    second = train(make_recipe(stages=stages, tokenizer=tokenizer), output=tmp_path / "second")
    before = read_metrics(second / "metrics.jsonl")[2]
    after = read_metrics(finished / "metrics.jsonl")[-1]
    assert before["loss/code"] == pytest.approx(after["loss/code"], abs=1e-6)


def test_an_earlier_run_is_moved_aside(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root = tmp_path / "run"
    for number in range(2):
        root.mkdir()
        (root / "mine.txt").write_text(f"{number}")
        train(tiny_recipe, output=root)
        assert f"was moved to {root}.{number + 1}" in capsys.readouterr().err
        assert (tmp_path / f"run.{number + 1}" / "mine.txt").read_text() == f"{number}"
        root.rename(tmp_path / f"kept{number}")


def test_a_file_as_output(tiny_recipe: Recipe, tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(NotADirectoryError, match=r"output .*run is a file"):
        train(tiny_recipe, output=tmp_path / "run")


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        pytest.param("loss", "after step 1 of 4: the loss is nan", id="nan-in-the-loss"),
        pytest.param(
            "gradient",
            "after step 1 of 4: the norm of the gradient is inf",
            id="inf-in-the-gradient",
        ),
        pytest.param(
            "weight",
            "after step 4 of 4: the held-out loss on prose is nan",
            id="nan-after-the-last-step",
        ),
    ],
)
def test_a_loss_that_is_not_finite(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str, message: str
):
    backward = StageState._backward

    def poisoned(self: StageState, batch: Any) -> float:
        loss, step = backward(self, batch), self.counters.step + 1
        if poison == "weight" and step == 9:
            with torch.no_grad():
                self.model.model.norm.weight[0] = float("nan")
        if poison == "gradient" and step == 7:
            self.model.model.norm.weight.grad[0] = float("inf")
        return float("nan") if poison == "loss" and step == 7 else loss

    root = tmp_path / "run"
    monkeypatch.setattr(StageState, "_backward", poisoned)
    with pytest.raises(ValueError, match=rf"stage 'grow', {message}; lower schedule.peak \(0.01\)"):
        train(tiny_recipe, output=root)
    if poison != "weight":
        # the last good one, of the end of the first stage, is there and can be resumed from
        assert list_checkpoints(root / "steps")[-1].name == "step-00000005"
        monkeypatch.setattr(StageState, "_backward", backward)
        train(tiny_recipe, output=root, resume=True)


def test_a_tokenizer_larger_than_the_model(
    make_recipe: Callable[..., Recipe], finished: Path, tmp_path: Path
):
    stages = make_recipe().resolved()["stages"][:1]
    stages[0]["model"]["config"] |= {"vocab_size": 270}
    with pytest.raises(ValueError, match=r"vocab_size 270, but the tokenizer has 280 tokens"):
        train(
            make_recipe(stages=stages, tokenizer={"path": str(finished / "checkpoint")}),
            output=tmp_path / "second",
        )
    assert not (tmp_path / "second").exists()


def test_z_loss_needs_the_kernels(make_recipe: Callable[..., Recipe], tmp_path: Path):
    stages = make_recipe().resolved()["stages"][:1]
    stages[0] |= {"kernels": False, "objective": {"z_loss": 1e-4}}
    with pytest.raises(ValueError, match=r"stages\[0\]\.objective\.z_loss is 0\.0001, which needs"):
        train(make_recipe(stages=stages), output=tmp_path / "run")


def test_a_disk_that_is_full_at_the_end(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_to_full_disk(*args: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            save_model(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as full:
        full.setattr(trainer, "save_model", save_to_full_disk)
        with pytest.raises(OSError, match=r"cannot write the model .*checkpoint: .*--resume"):
            train(tiny_recipe, output=root)
    assert not list(root.glob("checkpoint*"))
    train(tiny_recipe, output=root, resume=True)
    assert (root / "checkpoint" / "model.safetensors").is_file()


def test_unknown_comparison(tiny_recipe: Recipe, tmp_path: Path):
    with pytest.raises(ValueError, match="compare is 'luck', expected 'scratch'"):
        train(tiny_recipe, output=tmp_path / "run", compare="luck")


def test_threads_and_determinism_are_restored(tiny_recipe: Recipe, tmp_path: Path):
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    train(tiny_recipe, output=tmp_path / "run")
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_decay_is_for_matrices_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    groups = build_optimizer(model, Optimizer(weight_decay=0.3), peak=1.0).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [0.3, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("steps", "fractions"),
    [
        pytest.param(100, (0.1, 0.5, 0.2), id="round-numbers"),
        pytest.param(5, (0.1, 0.5, 0.3), id="each-rounds-up"),
        pytest.param(1, (0.3, 0.4, 0.3), id="a-single-step"),
        pytest.param(7, (0.0, 0.0, 0.0), id="constant"),
    ],
)
def test_infinite_schedule_fills_the_stage(steps: int, fractions: tuple[float, float, float]):
    warmup, cooldown, anneal = fractions
    spec = InfiniteSchedule(
        kind="infinite", peak=1.0, warmup=warmup, cooldown=cooldown, anneal=anneal
    )
    schedule = build_schedule(spec, steps=steps)
    assert schedule.value(steps) == pytest.approx(0.1 if round(anneal * steps) else 0.55)


def test_metrics_are_cut_back(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write({"a": 1})
    length = metrics.sync()
    metrics.write({"b": 0.1})
    metrics.close()
    assert read_metrics(path) == [{"a": 1}, {"b": 0.1}]
    truncate_metrics(path, length)
    assert read_metrics(path) == [{"a": 1}]
    with pytest.raises(ValueError, match=r"has 9 bytes but the checkpoint was made at 10"):
        truncate_metrics(path, length + 1)
