"""Every objective of a recipe: its loss on a packed batch, its run, and its run after a break."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import apical
from apical.growth.train import selection
from apical.growth.train.data.packing import pack
from apical.growth.train.data.source import TokenSource
from apical.growth.train.objective import BatchLoss, next_tokens
from apical.growth.train.recipe.schema import Recipe, Stage
from apical.growth.train.results.metrics import read_metrics
from apical.growth.train.run import train
from apical.growth.train.stage import StageState
from apical.growth.train.teacher import Teacher

Read = Callable[[Path], tuple[list[dict[str, Any]], bytes]]
pytestmark = pytest.mark.usefixtures("quick_report")

SALT = {"kind": "salt", "teacher": "previous", "transition": 0.5, "top_k": 3, "z_loss": 1e-3}
OBJECTIVES: dict[str, dict[str, Any]] = {
    # 2 of the 4 steps distil
    "salt": SALT,
    "salt-with-selection": SALT | {"select": {"keep": 0.5, "top_k": 5}},
    "self-distillation-from-the-start": {"kind": "self_distillation"},
    "self-distillation-from-the-mean": {"kind": "self_distillation", "decay": 0.5},
    # a step of burn-in, then three temperatures
    "reweighted": {
        "kind": "reweighted",
        "strategy": "quadratic",
        "burn_in": 0.25,
        "temperature": 2.0,
        "final_temperature": 0.5,
    },
    # the embeddings of the start are state
    "emo": {"kind": "emo"},
    "emo-with-the-embeddings-of-now": {"kind": "emo", "cost": "current", "mode": 2},
    "spherical": {"kind": "spherical_z", "location": 5.0, "sharpness": 1.0},
    "taylor": {"kind": "taylor_softmax"},
    "spherical-softmax": {"kind": "spherical_softmax", "offset": 0.1},
}


def stages(make_recipe: Callable[..., Recipe], objective: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a small model's stage, and one of a larger model from scratch with the objective."""
    first, second, _ = make_recipe().resolved()["stages"]
    larger = first["model"]["config"] | {"num_hidden_layers": 2}
    second |= {
        "model": {"from": "scratch", "config": larger},
        "objective": objective,
        "name": "second",
    }
    return [first, second]


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


@pytest.fixture
def kill_before(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a context in which the nth step of a run does not happen."""

    def broken(nth: int) -> Any:
        step, calls = StageState.step, iter(range(1, 10_000))

        def stepping(stage: StageState) -> Any:
            if next(calls) == nth:
                raise Killed
            return step(stage)

        patch = pytest.MonkeyPatch()
        patch.setattr(StageState, "step", stepping)
        return patch

    return broken


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_that_is_broken_off_goes_on_with_the_same_bits(
    make_recipe: Callable[..., Recipe],
    kill_before: Callable[..., Any],
    tmp_path: Path,
    outcome: Read,
    name: str,
):
    recipe = make_recipe(stages=stages(make_recipe, OBJECTIVES[name]), checkpoint_every=1)
    whole = outcome(train(recipe, output=tmp_path / "whole"))
    # of the second stage: before its 2nd step, which distils, and its 4th, which does not
    for nth in (7, 9):
        root = tmp_path / f"broken-{nth}"
        patch = kill_before(nth)
        with patch.context(), pytest.raises(Killed):
            train(recipe, output=root)
        patch.undo()
        train(recipe, output=root, resume=True)
        assert outcome(root) == whole


def test_every_objective_trains_another_model(
    make_recipe: Callable[..., Recipe], tmp_path: Path, outcome: Read
):
    objectives = OBJECTIVES | {"causal": {"kind": "causal"}}
    weights = {
        name: outcome(train(make_recipe(stages=stages(make_recipe, spec)), output=tmp_path / name))[
            1
        ]
        for name, spec in objectives.items()
    }
    assert len(set(weights.values())) == len(objectives)


def test_salt_that_never_distils_is_next_token_prediction(
    make_recipe: Callable[..., Recipe], tmp_path: Path, outcome: Read
):
    # 1 % of 4 steps is none
    never = SALT | {"transition": 0.01}
    runs = [
        outcome(train(make_recipe(stages=stages(make_recipe, spec)), output=tmp_path / name))
        for name, spec in {"salt": never, "causal": {"kind": "causal", "z_loss": 1e-3}}.items()
    ]
    assert runs[0][1] == runs[1][1]


def test_a_teachers_forward_is_counted(make_recipe: Callable[..., Recipe], tmp_path: Path):
    flops = {}
    for name, share in {"none": 0.01, "half": 0.5, "all": 1.0}.items():
        recipe = make_recipe(stages=stages(make_recipe, SALT | {"transition": share}), log_every=1)
        root = train(recipe, output=tmp_path / name)
        trained = [r for r in read_metrics(root / "metrics.jsonl") if r["kind"] == "train"]
        flops[name] = np.diff([record["flops"] for record in trained])[4:]
    # the teacher is the small model of the first stage, whose training is three such passes
    extra = flops["all"] - flops["none"]
    assert (flops["half"] - flops["none"]).tolist() == [*extra[:2], 0, 0]
    assert (extra > 0).all()
    assert (extra * 3 < flops["none"]).all()


def test_a_teacher_from_a_directory(
    make_recipe: Callable[..., Recipe], finished: Path, tmp_path: Path, outcome: Read
):
    teacher = str(finished / "checkpoint")
    recipe = make_recipe(stages=stages(make_recipe, SALT | {"teacher": teacher}))
    root = train(recipe, output=tmp_path / "run")
    # a directory is not copied into the checkpoints
    previous = make_recipe(stages=stages(make_recipe, SALT))
    other = train(previous, output=tmp_path / "previous")
    assert outcome(root)[1] != outcome(other)[1]

    def size(run: Path) -> int:
        files = next(iter(sorted((run / "steps").iterdir())[-1:])).glob("*.distcp")
        return sum(file.stat().st_size for file in files)

    assert size(root) < size(other)


def test_a_teacher_of_another_tokenizer_is_refused(
    make_recipe: Callable[..., Recipe], finished: Path, tmp_path: Path
):
    teacher = str(finished / "checkpoint")
    tokenizer = {"train_on": ["prose"], "vocab_size": 280}
    recipe = make_recipe(
        stages=stages(make_recipe, SALT | {"teacher": teacher}), tokenizer=tokenizer
    )
    with pytest.raises(ValueError, match=r"stages\[1\]\.objective\.teacher .* has another tokeni"):
        train(recipe, output=tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"objective": SALT | {"top_k": 300}},
            r"stages\[1\]\.objective: top_k is 300, but the teacher has 280 tokens",
            id="more labels than words",
        ),
        pytest.param(
            {"objective": SALT | {"select": {"keep": 0.5, "top_k": 281}}},
            r"stages\[1\]\.objective: top_k is 281, but the teacher has 280 tokens",
            id="larger rank than words",
        ),
        pytest.param(
            {"context": 30, "max_position_embeddings": 64},
            r"stages\[1\]\.context is 30, above the teacher's max_position_embeddings 24",
            id="context beyond the teacher's",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_training(
    make_recipe: Callable[..., Recipe], tmp_path: Path, change: dict[str, Any], message: str
):
    two = stages(make_recipe, SALT)
    two[0]["model"]["config"]["max_position_embeddings"] = 24
    longest = change.pop("max_position_embeddings", None)
    if longest:
        two[1]["model"]["config"]["max_position_embeddings"] = longest
    two[1] |= change
    with pytest.raises(ValueError, match=message):
        train(make_recipe(stages=two), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["spherical", "taylor", "spherical-softmax"])
def test_a_soft_cap_is_refused_by_losses_of_moments(
    make_recipe: Callable[..., Recipe], tmp_path: Path, name: str
):
    two = stages(make_recipe, OBJECTIVES[name])
    # Gemma 2 caps its logits
    two[1]["model"]["config"] |= {"model_type": "gemma2", "final_logit_softcapping": 30.0}
    with pytest.raises(ValueError, match=r"stages\[1\]\.objective\.kind is .* bends the logits"):
        train(make_recipe(stages=two), output=tmp_path / "run")


# the loss itself, against the formulas on all logits


def tiny(layers: int) -> Any:
    config = AutoConfig.for_model(
        model_type="llama",
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.train()


def stage(objective: dict[str, Any]) -> Stage:
    return Stage.model_validate(
        {
            "name": "a",
            "model": {"from": "previous"},
            "data": {"prose": 1.0},
            "tokens": 400,
            "batch_tokens": 100,
            "context": 24,
            "objective": objective,
            "schedule": {"kind": "cosine", "peak": 1e-3},
        }
    )


PIECES = [np.arange(n) * 7 % 50 for n in (9, 2, 17, 5)]


def alone(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return every piece's log-probabilities and labels, computed without its neighbours."""
    rows, labels = [], []
    for piece in PIECES:
        ids = torch.from_numpy(piece)
        rows.append(model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1))
        labels.append(ids[1:])
    return rows, labels


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return tiny(2)


@pytest.mark.parametrize("step", [1, 2], ids=["the last that distils", "the first that does not"])
def test_the_loss_of_a_packed_batch_is_that_of_its_pieces(model: Any, step: int):
    plain, past = copy.deepcopy(model), tiny(1)
    rows, labels = alone(plain)
    nll = -torch.cat(rows).gather(1, torch.cat(labels)[:, None])[:, 0]
    with torch.no_grad():
        best = torch.cat(alone(past)[0]).mul(0.25).topk(3)
    mixed = -(best.values.softmax(-1) * torch.cat(rows).gather(1, best.indices)).sum(-1)
    expected = (nll / 3 + 2 * mixed / 3 if step < 2 else nll).mean()
    apical.use_kernels(model)
    spec = stage(SALT | {"z_loss": 0.0})
    loss = BatchLoss(spec, model, steps=4, teacher=Teacher(past, saved=True))
    assert loss.needs_teacher(step) == (step < 2)
    found = loss(model, pack(PIECES, ["prose"] * 4), step=step)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    found.backward()
    expected.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-7, atol=1e-11)


def test_reweighted_documents_are_the_pieces(model: Any):
    plain = copy.deepcopy(model)
    means = torch.stack(
        [-row.gather(1, own[:, None]).mean() for row, own in zip(*alone(plain), strict=True)]
    )
    place = 2 * (means - (means.max() + means.min()) / 2) / (means.max() - means.min())
    weights = ((1 - place.square()) / 2.0).softmax(0).detach()
    apical.use_kernels(model)
    loss = BatchLoss(stage(OBJECTIVES["reweighted"]), model, steps=4)
    batch = pack(PIECES, ["prose"] * 4)
    # burn-in, then the first temperature
    for step, expected in enumerate([means.mean(), (weights * means).sum()]):
        torch.testing.assert_close(loss(model, batch, step=step), expected, rtol=1e-10, atol=0)


def test_the_running_mean_moves_and_the_start_stays(model: Any):
    for decay, share in {0.75: 0.25, 1.0: 0.0}.items():
        teacher = Teacher(copy.deepcopy(model), saved=True)
        spec = stage({"kind": "self_distillation", "decay": decay})
        loss = BatchLoss(spec, model, steps=4, teacher=teacher)
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter += 1
        loss.after_step(moved)
        for past, start in zip(teacher.model.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(past, start.detach() + share)


def test_pieces_are_chosen_by_the_median_of_masked_losses(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("APICAL_CACHE", str(tmp_path))
    source = TokenSource(
        name="prose",
        ids=np.concatenate(PIECES),
        lengths=np.array([len(piece) for piece in PIECES]),
        n_documents=4,
        n_bytes=99,
        fingerprint="x",
    )
    scores = []
    for row, own in zip(*alone(model.eval()), strict=True):
        inside = (row.topk(47).indices == own[:, None]).any(-1)
        scores.append((-row.gather(1, own[:, None])[:, 0] * inside).quantile(0.5).item())
    spec = stage(SALT | {"select": {"keep": 0.5, "top_k": 47}})
    # 25 tokens at a time: the pieces are scored in two batches
    spec = spec.model_copy(update={"batch_tokens": 25})
    choose = selection.selector(spec, Teacher(model, saved=True))
    assert choose is not None
    chosen = choose(source)
    # no ties, and a few tokens outside the top k
    assert len(set(scores)) == 4
    expected = sorted(np.argsort(scores)[-2:].tolist())
    assert chosen.lengths.tolist() == [len(PIECES[n]) for n in expected]
    for place, number in enumerate(expected):
        assert chosen.piece(place).tolist() == PIECES[number].tolist()
    assert chosen.fingerprint != source.fingerprint
    # the teacher is not asked again
    monkeypatch.setattr(Teacher, "scores", None)
    assert choose(source).fingerprint == chosen.fingerprint
    assert selection.selector(stage(SALT), None) is None


def test_labels_are_the_next_tokens_of_the_same_piece():
    batch = pack(PIECES[1:3], ["a", "b"])
    expected = [*PIECES[1][1:], -100, *PIECES[2][1:], -100]
    assert next_tokens(batch.labels).tolist() == expected
