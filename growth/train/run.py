"""The main job: a recipe becomes a trained model, its record and its report."""

from pathlib import Path

from .checkpoint import newest_checkpoint, read_state
from .compare import (
    Comparison,
    check_comparable,
    compare_arms,
    evaluation_interval,
    scratch_recipe,
)
from .directory import RunDirectory
from .environment import reproducible
from .inputs import Inputs
from .interrupts import Interrupts
from .outline import outline
from .recipe.schema import Recipe, difference
from .results.console import Console, say, show
from .results.metrics import read_metrics
from .results.report import result_tables, write_report
from .trainer import Trainer


def train(
    recipe: Recipe, *, output: Path | None = None, resume: bool = False, compare: str | None = None
) -> Path:
    """Run a recipe and return its directory, with the model in `checkpoint/` and a report.

    Determinism: on a CPU the same recipe, data, threads and versions give the same bits, also
    when the run was stopped anywhere and resumed.

    Args:
        output: the run's directory, `runs/<name>` by default; an earlier one is moved aside.
        resume: go on from the newest good checkpoint in the directory.
        compare: "scratch" also trains the grown architecture from scratch for the same FLOPs.

    Raises:
        ValueError: the recipe, the data or the loss is unusable, or the recipe changed since.
        FileNotFoundError: there is no run to resume, or no text.
        OSError: the disk is full or not writable.
        SystemExit: a signal asked for the end; the code is 128 + its number.
    """
    if compare not in (None, "scratch"):
        raise ValueError(f"compare is {compare!r}, expected 'scratch'")
    if compare:
        check_comparable(recipe)
    recipe = recipe.smoked()
    directory = RunDirectory(output or Path("runs") / recipe.name)
    with reproducible(threads=recipe.threads):
        _train(recipe, directory, resume=resume)
        comparison = _compare(recipe, directory) if compare else None
    records = read_metrics(directory.metrics)
    write_report(directory.root, records, recipe.to_yaml(), comparison)
    show(result_tables(records, comparison))
    say(f"model: {directory.model}   report: {directory.report}")
    return directory.root


def _train(
    recipe: Recipe, directory: RunDirectory, *, resume: bool, evaluate_every: int | None = None
) -> None:
    checkpoint = _find_checkpoint(recipe, directory) if resume else None
    if resume and directory.is_finished:
        say(f"{directory.root} is finished: nothing to resume")
        return
    inputs = Inputs(recipe)
    plans = outline(recipe, inputs.tokenizer, inputs.pairs_per_token)
    if not resume:
        _create(directory, recipe)
    total = sum(plan.flops for plan in plans)
    with Interrupts() as interrupts, Console(total=total, every=recipe.log_every) as console:
        Trainer(
            recipe,
            inputs=inputs,
            plans=plans,
            directory=directory,
            console=console,
            interrupts=interrupts,
            evaluate_every=evaluate_every,
        ).run(checkpoint)


def _compare(recipe: Recipe, directory: RunDirectory) -> Comparison:
    records = read_metrics(directory.metrics)
    scratch = scratch_recipe(recipe, records)
    arm = RunDirectory(directory.root / "scratch")
    # what is there belongs to this run: another one would have moved it aside
    _train(scratch, arm, resume=arm.recipe.is_file(), evaluate_every=evaluation_interval(scratch))
    return compare_arms(recipe, records, read_metrics(arm.metrics))


def _find_checkpoint(recipe: Recipe, directory: RunDirectory) -> Path | None:
    """Return where to go on; None if the run ended before its first checkpoint, or is finished."""
    directory.require_run()
    if not directory.has_saved:
        return None
    checkpoint = newest_checkpoint(directory.steps)
    changes = difference(read_state(checkpoint)["recipe"], recipe.resolved())
    if changes:
        raise ValueError(
            f"recipe changed since {directory.root} was started: {'; '.join(changes)}; "
            "start a new run with --output"
        )
    return checkpoint


def _create(directory: RunDirectory, recipe: Recipe) -> None:
    aside = directory.create(recipe.to_yaml())
    if aside:
        say(f"the earlier run in {directory.root} was moved to {aside}")
