"""Objectives in a recipe: defaults, and what is refused with its line."""

from pathlib import Path

import pytest

from apical.growth.train.recipe.objective import Causal, ReweightedObjective, SaltObjective
from apical.growth.train.recipe.schema import load_recipe

RECIPES = Path(__file__).parents[4] / "recipes"
TEXT = """\
name: small
tokenizer: {train_on: [prose], vocab_size: 300}
sources: {prose: {corpus: prose}}
stages:
  - &first
    name: first
    model: {from: scratch, config: {model_type: llama, max_position_embeddings: 32}}
    data: {prose: 1.0}
    tokens: 1000
    batch_tokens: 64
    context: 32
    schedule: {kind: cosine, peak: 3e-3}
  - <<: *first
    name: second
    objective: OBJECTIVE
"""


def load(path: Path, objective: str, *overrides: str):
    file = path / "x.yaml"
    file.write_text(TEXT.replace("OBJECTIVE", objective))
    return load_recipe(file, overrides).stages[1].objective


def test_values_and_defaults_are_read(tmp_path):
    assert load(tmp_path, "{z_loss: 0.1}") == Causal(z_loss=0.1)
    salt = load(tmp_path, "{kind: salt, teacher: previous, transition: 1, select: {keep: 0.5}}")
    assert isinstance(salt, SaltObjective)
    assert (salt.transition, salt.rho, salt.top_k, salt.z_loss) == (1.0, 0.25, 10, 0.0)
    assert salt.select is not None
    assert (salt.select.keep, salt.select.top_k) == (0.5, 10)
    reweighted = load(tmp_path, "{kind: reweighted, strategy: extremes, burn_in: 0}")
    assert reweighted == ReweightedObjective(kind="reweighted", strategy="extremes", burn_in=0.0)
    changed = load(tmp_path, "{kind: reweighted}", "second.objective.temperature=0.5")
    assert isinstance(changed, ReweightedObjective)
    assert changed.temperature == 0.5


MISTAKES = {
    "unknown kind": (
        "{kind: salty}",
        "objective.kind: unknown value 'salty'; did you mean 'salt'?",
    ),
    "key of another kind": (
        "{kind: reweighted, teacher: previous}",
        "objective.teacher: unknown key; known: burn_in, final_temperature, kind, strategy, "
        "temperature, z_loss",
    ),
    "no teacher": ("{kind: salt}", "objective.teacher: missing key"),
    "teacher that is not there": (
        "{kind: salt, teacher: nowhere}",
        "objective.teacher: 'nowhere' is not previous or a checkpoint directory; names on a hub "
        "are not fetched",
    ),
    "never a transition": (
        "{kind: salt, teacher: previous, transition: 0}",
        "objective.transition: should be greater than 0, got 0",
    ),
    "transition after the end": (
        "{kind: salt, teacher: previous, transition: 1.5}",
        "objective.transition: should be less than or equal to 1, got 1.5",
    ),
    "more than all of the teacher": (
        "{kind: salt, teacher: previous, omega: 2}",
        "objective.omega: should be less than or equal to 1, got 2",
    ),
    "no label of the teacher": (
        "{kind: salt, teacher: previous, top_k: 0}",
        "objective.top_k: should be greater than 0, got 0",
    ),
    "nothing to read": (
        "{kind: salt, teacher: previous, select: {keep: 0}}",
        "objective.select.keep: should be greater than 0, got 0",
    ),
    "a mean without an end": (
        "{kind: self_distillation, decay: 1.1}",
        "objective.decay: should be less than or equal to 1, got 1.1",
    ),
    "unknown strategy": (
        "{kind: reweighted, strategy: upper}",
        "objective.strategy: unknown value 'upper'; did you mean 'linupper'?",
    ),
    "frozen temperature": (
        "{kind: reweighted, temperature: 0}",
        "objective.temperature: should be greater than 0, got 0",
    ),
    "burn-in of everything": (
        "{kind: reweighted, burn_in: 1}",
        "objective.burn_in: should be less than 1, got 1",
    ),
    "neither of EMO's modes": (
        "{kind: emo, mode: 3}",
        "objective.mode: should be less than or equal to 2, got 3",
    ),
    "a z-loss without sharpness": (
        "{kind: spherical_z, sharpness: 0}",
        "objective.sharpness: should be greater than 0, got 0",
    ),
    "a logarithm of nothing": (
        "{kind: spherical_softmax, offset: 0}",
        "objective.offset: should be greater than 0, got 0",
    ),
    "an offset that no one has tuned": (
        "{kind: spherical_softmax}",
        "objective.offset: missing key",
    ),
    "an offset that is fixed": (
        "{kind: taylor_softmax, offset: 1}",
        "objective.offset: unknown key; known: kind",
    ),
    "no mapping": ("salt", "objective: expected a mapping, got 'salt'"),
}


@pytest.mark.parametrize(("written", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_says_where(tmp_path, written, expected):
    with pytest.raises(ValueError, match="objective") as caught:
        load(tmp_path, written)
    assert str(caught.value) == f"{tmp_path / 'x.yaml'}:15: stages[1].{expected}"


def test_kinds_that_need_the_kernels(tmp_path):
    with pytest.raises(ValueError, match="kernels") as caught:
        load(tmp_path, "{kind: reweighted}", "second.kernels=false")
    expected = "15: stages[1].objective.kind: is reweighted, which needs `kernels: true`"
    assert str(caught.value) == f"{tmp_path / 'x.yaml'}:{expected}"


def test_the_first_stage_has_no_previous_one(tmp_path):
    with pytest.raises(ValueError, match="previous") as caught:
        load(tmp_path, "{}", "first.objective={kind: salt, teacher: previous}")
    expected = (
        "--set first.objective.teacher: the first stage has no previous one; expected a directory"
    )
    assert str(caught.value) == expected


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_read(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    kinds = [stage.objective.kind for stage in recipe.stages]
    # the others are named after their objective
    assert path.stem in ("demo", "sltrain") or path.stem in kinds
