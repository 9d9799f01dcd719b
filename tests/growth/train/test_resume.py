"""A run that is killed anywhere and resumed ends with the same bits as one that is not."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apical.growth import publish
from apical.growth.train import checkpoint, model, run, trainer
from apical.growth.train.checkpoint import list_checkpoints
from apical.growth.train.recipe.schema import Recipe
from apical.growth.train.run import train
from apical.growth.train.stage import StageState

Outcome = tuple[list[dict[str, Any]], bytes]
Read = Callable[[Path], Outcome]


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


pytestmark = pytest.mark.usefixtures("quick_report")


@pytest.fixture
def uninterrupted(finished: Path, outcome: Read) -> Outcome:
    """Return the outcome of a run without a break."""
    return outcome(finished)


def break_call(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, nth: int, act: Callable[[], None]
) -> None:
    """Let the nth call of a function act instead of, or before, doing its work."""
    function, calls = getattr(owner, name), iter(range(1, 10_000))

    def broken(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == nth:
            act()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


def kill() -> None:
    raise Killed


@pytest.mark.parametrize(
    ("owner", "name", "nth"),
    [
        pytest.param(trainer, "first_model", 1, id="before-the-first-checkpoint"),
        pytest.param(trainer, "evaluate", 1, id="first-evaluation"),
        pytest.param(StageState, "step", 1, id="before-any-step"),
        pytest.param(StageState, "step", 2, id="before-a-checkpoint-is-due"),
        pytest.param(StageState, "step", 3, id="right-after-a-checkpoint"),
        pytest.param(StageState, "step", 5, id="in-the-middle-of-a-logging-window"),
        pytest.param(trainer, "evaluate", 3, id="evaluation-at-the-end-of-a-stage"),
        pytest.param(trainer, "evaluate", 4, id="between-two-sources-of-an-evaluation"),
        pytest.param(trainer, "first_model", 2, id="stage-boundary"),
        pytest.param(StageState, "step", 6, id="first-step-of-the-grown-model"),
        pytest.param(StageState, "step", 8, id="within-the-grown-stage"),
        pytest.param(StageState, "step", 13, id="last-step"),
        pytest.param(checkpoint, "_write_tensors", 3, id="before-the-tensors-are-written"),
        pytest.param(checkpoint, "_manifest", 4, id="before-the-manifest-is-written"),
        pytest.param(publish, "_rename", 5, id="before-the-checkpoint-has-its-name"),
        pytest.param(checkpoint, "list_checkpoints", 4, id="before-old-checkpoints-go"),
        pytest.param(trainer, "save_model", 1, id="between-last-record-and-model"),
        pytest.param(model.PreTrainedModel, "save_pretrained", 1, id="while-the-model-is-written"),
        pytest.param(run, "write_report", 1, id="before-the-report"),
    ],
)
def test_killed_and_resumed_is_the_same_run(
    tiny_recipe: Recipe,
    uninterrupted: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcome: Read,
    owner: Any,
    name: str,
    nth: int,
):
    root = tmp_path / "run"
    with monkeypatch.context() as broken:
        break_call(broken, owner, name, nth=nth, act=kill)
        with pytest.raises(Killed):
            train(tiny_recipe, output=root)
    assert train(tiny_recipe, output=root, resume=True) == root
    assert outcome(root) == uninterrupted
    assert (root / "report.html").is_file()


def test_killed_twice_in_the_same_place(
    tiny_recipe: Recipe,
    uninterrupted: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcome: Read,
):
    root = tmp_path / "run"
    for resume in (False, True):
        with monkeypatch.context() as broken:
            break_call(broken, StageState, "step", nth=4 - resume, act=kill)
            with pytest.raises(Killed):
                train(tiny_recipe, output=root, resume=resume)
    train(tiny_recipe, output=root, resume=True)
    assert outcome(root) == uninterrupted


def test_dropout_goes_on_where_it_was(
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcome: Read,
):
    # torch's generator moves with every step here; the other recipe never draws from it
    stages = make_recipe().resolved()["stages"][:1]
    stages[0]["model"]["config"]["attention_dropout"] = 0.5
    stages[0]["kernels"] = False
    recipe = make_recipe(stages=stages)
    whole = outcome(train(recipe, output=tmp_path / "whole"))
    with monkeypatch.context() as broken:
        break_call(broken, StageState, "step", nth=4, act=kill)
        with pytest.raises(Killed):
            train(recipe, output=tmp_path / "run")
    assert outcome(train(recipe, output=tmp_path / "run", resume=True)) == whole


@pytest.mark.parametrize(
    ("number", "owner", "name", "nth", "saved"),
    [
        # 3 is no multiple of checkpoint_every: the signal itself makes the checkpoint
        pytest.param(signal.SIGTERM, StageState, "step", 3, "step-00000003", id="term-in-a-step"),
        pytest.param(signal.SIGINT, StageState, "step", 3, "step-00000003", id="int-in-a-step"),
        # the end of the stage before has this step already
        pytest.param(signal.SIGTERM, trainer, "evaluate", 5, "step-00000005", id="in-evaluation"),
        pytest.param(signal.SIGTERM, trainer, "first_model", 2, "step-00000005", id="at-boundary"),
    ],
)
def test_signal_ends_the_run_with_a_checkpoint(
    tiny_recipe: Recipe,
    uninterrupted: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcome: Read,
    number: signal.Signals,
    owner: Any,
    name: str,
    nth: int,
    saved: str,
):
    root, before = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as broken:
        break_call(broken, owner, name, nth=nth, act=lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as caught:
            train(tiny_recipe, output=root)
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert list_checkpoints(root / "steps")[-1].name == saved
    assert f"--resume --output {root}" in capsys.readouterr().err
    train(tiny_recipe, output=root, resume=True)
    assert outcome(root) == uninterrupted


def test_second_interrupt_acts_at_once(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def twice() -> None:
        remembered = signal.getsignal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        # with other threads about, python handles a signal a little later; two that wait are one
        while signal.getsignal(signal.SIGINT) == remembered:
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    break_call(monkeypatch, StageState, "step", nth=2, act=twice)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipe, output=tmp_path / "run")


_PROGRAM = """
import sys
from pathlib import Path
from apical.growth.train.recipe.schema import load_recipe
from apical.growth.train.run import train
train(load_recipe(sys.argv[1]), output=Path(sys.argv[2]))
"""


def test_kill_9_in_another_process(
    tiny_recipe: Recipe, uninterrupted: Outcome, tmp_path: Path, outcome: Read
):
    root, recipe = tmp_path / "run", tmp_path / "tiny.yaml"
    recipe.write_text(tiny_recipe.to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(recipe), str(root)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    # step 4 is a checkpoint, and 9 more steps are to come
    while not (root / "steps" / "step-00000004").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (root / "checkpoint").exists()
    train(tiny_recipe, output=root, resume=True)
    assert outcome(root) == uninterrupted


def test_changed_recipe_is_refused_with_the_difference(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / "run"
    recipe = make_recipe()
    with monkeypatch.context() as broken:
        break_call(broken, StageState, "step", nth=3, act=kill)
        with pytest.raises(Killed):
            train(recipe, output=root)
    stages = recipe.resolved()["stages"]
    stages[1]["tokens"] = 1000
    other = make_recipe(seed=7, stages=stages)
    with pytest.raises(ValueError, match=r"recipe changed since .*run was started: ") as caught:
        train(other, output=root, resume=True)
    assert "seed: 0 -> 7; stages[1].tokens: 384 -> 1000; start a new run" in str(caught.value)
    # how often things are written is no difference
    with monkeypatch.context() as broken:
        break_call(broken, StageState, "step", nth=1, act=kill)
        with pytest.raises(Killed):
            train(make_recipe(checkpoint_every=5), output=root, resume=True)


def test_changed_text_is_refused(
    make_recipe: Callable[..., Recipe],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    root, text = tmp_path / "run", tmp_path / "prose.jsonl"
    text.write_text((corpus / "prose.jsonl").read_text())
    sources = make_recipe().resolved()["sources"]
    sources["prose"]["files"] = [str(text)]
    recipe = make_recipe(sources=sources)
    with monkeypatch.context() as broken:
        break_call(broken, StageState, "step", nth=3, act=kill)
        with pytest.raises(Killed):
            train(recipe, output=root)
    text.write_text(text.read_text().replace("the", "a"))
    with pytest.raises(ValueError, match=r"prose, train, context 24 changed since the run"):
        train(recipe, output=root, resume=True)


def test_nothing_to_resume(tiny_recipe: Recipe, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no run to resume"):
        train(tiny_recipe, output=tmp_path / "nowhere", resume=True)


def test_resuming_a_finished_run_changes_nothing(
    tiny_recipe: Recipe,
    uninterrupted: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcome: Read,
):
    root = train(tiny_recipe, output=tmp_path / "run")
    break_call(monkeypatch, StageState, "step", nth=1, act=kill)
    assert train(tiny_recipe, output=root, resume=True) == root
    assert outcome(root) == uninterrupted
    assert f"model: {root / 'checkpoint'}" in capsys.readouterr().err
