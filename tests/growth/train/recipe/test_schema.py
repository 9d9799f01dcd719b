"""Recipes: what is read, what is refused and with which line, `--set`, and what resume compares."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from apical.growth.operators import Stack
from apical.growth.train.recipe.schema import Recipe, difference, load_recipe

ROOT = Path(__file__).parents[4]
TEXT = """\
name: small
tokenizer: {train_on: [prose], vocab_size: 300}
sources:
  prose: {corpus: prose, max_bytes: 1000}
  notes: {files: ["*.txt"]}
stages:
  - name: first
    model:
      from: scratch
      config: {model_type: llama, hidden_size: 64, max_position_embeddings: 32}
    data: {prose: 1.0}
    tokens: 1000
    batch_tokens: 64
    context: 32
    schedule: {kind: cosine, peak: 3e-3}
  - name: second
    model: {from: previous, grow: {stack: {factor: 2}}}
    data: {prose: 0.25, notes: 0.75}
    tokens: 1e3
    batch_tokens: 64
    context: 32
    schedule: {kind: infinite, peak: 0.001}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def _write(content: str | bytes) -> Path:
        path = tmp_path / "x.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return _write


def refusal(path: Path, *overrides: str) -> str:
    """Return the message of the refusal, which must be one line, with the file's name cut off."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers compare the whole text)
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}:")


def test_values_and_defaults_are_read(write):
    recipe = load_recipe(write(TEXT))
    first, second = recipe.stages
    assert (first.schedule.peak, first.schedule.kind) == (0.003, "cosine")
    assert second.tokens == 1000
    assert isinstance(second.tokens, int)
    assert second.data == {"prose": 0.25, "notes": 0.75}
    assert (first.model.operator(), second.model.operator()) == (None, Stack(factor=2))
    # moments can be kept only where there are some
    assert (first.model.optimizer, second.model.optimizer) == ("reset", "keep")
    assert (recipe.seed, recipe.threads, first.kernels, first.evaluate) == (0, None, True, None)


def test_a_recipe_cannot_be_changed(write):
    recipe = load_recipe(write(TEXT))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


# what is written, by what it replaces -> line, place and text of the refusal
MISTAKES = {
    "heads that do not share evenly": (
        ("hidden_size: 64", "hidden_size: 64, num_attention_heads: 4, num_key_value_heads: 3"),
        "10: stages[0].model.config.num_key_value_heads: is 3, should divide num_attention_heads 4",
    ),
    "a model without layers": (
        ("hidden_size: 64", "hidden_size: 64, num_hidden_layers: 0"),
        "10: stages[0].model.config.num_hidden_layers: is 0, should be at least 1",
    ),
    "unknown key, near a known one": (
        ("    tokens: 1000", "    tokns: 1000"),
        "12: stages[0].tokns: unknown key; did you mean 'tokens'?",
    ),
    "unknown key, near nothing": (
        ("name: small", "name: small\nqqq: 1"),
        "2: qqq: unknown key; known: checkpoint_every, log_every, name, seed, smoke, sources, "
        "stages, threads, tokenizer",
    ),
    "unknown key inside the variant of a union": (
        ("peak: 3e-3", "peek: 3e-3"),
        "15: stages[0].schedule.peek: unknown key; did you mean 'peak'?",
    ),
    "missing key": (("    tokens: 1000\n", ""), "7: stages[0].tokens: missing key"),
    "missing tag of a union": (
        ("kind: cosine, ", ""),
        "15: stages[0].schedule.kind: missing key",
    ),
    "unknown tag of a union": (
        ("kind: cosine", "kind: cosin"),
        "15: stages[0].schedule.kind: unknown value 'cosin'; did you mean 'cosine'?",
    ),
    "key of the other variant": (
        ("kind: cosine", "kind: cosine, anneal: 0.1"),
        "15: stages[0].schedule.anneal: unknown key; known: kind, min_ratio, peak, warmup",
    ),
    "text for a number": (
        ("tokens: 1000", "tokens: many"),
        "12: stages[0].tokens: expected a whole number, got 'many'",
    ),
    "quoted number": (
        ("tokens: 1000", "tokens: '1000'"),
        "12: stages[0].tokens: expected a whole number, got '1000'",
    ),
    "fraction for a count": (
        ("tokens: 1000", "tokens: 10.5"),
        "12: stages[0].tokens: expected a whole number, got 10.5",
    ),
    "zero tokens": (
        ("tokens: 1000", "tokens: 0"),
        "12: stages[0].tokens: should be greater than 0, got 0",
    ),
    "a number for a mapping": (
        ("{kind: cosine, peak: 3e-3}", "3"),
        "15: stages[0].schedule: expected a mapping, got 3",
    ),
    "not a number": (
        ("peak: 3e-3", "peak: .nan"),
        "15: stages[0].schedule.peak: expected a finite number, got nan",
    ),
    "duplicate key": (
        ("    tokens: 1000", "    tokens: 1000\n    tokens: 2000"),
        "13: stages[0].tokens: duplicate key, first given in line 12",
    ),
    "two stages of one name": (
        ("name: second", "name: first"),
        "16: stages[1].name: 'first' is also the name of stages[0], expected another",
    ),
    "stage named like a top-level key": (
        ("name: second", "name: seed"),
        "16: stages[1].name: 'seed' is a key of the recipe itself, expected another",
    ),
    "name that leaves the run directory": (
        ("name: small", "name: ../x"),
        "1: name: expected a name: a letter, then letters, digits, - and _, got '../x'",
    ),
    "no source": (
        ("sources:\n  prose: {corpus: prose, max_bytes: 1000}\n", "sources: {}\nx:\n"),
        "4: x: unknown key; known: checkpoint_every, log_every, name, seed, smoke, sources, "
        "stages, threads, tokenizer",
    ),
    "source of both kinds": (
        ('files: ["*.txt"]', 'files: ["*.txt"], corpus: code'),
        "5: sources.notes: expected exactly one of 'corpus' and 'files'",
    ),
    "key of the other kind of source": (
        ('files: ["*.txt"]', 'files: ["*.txt"], max_bytes: 5'),
        "5: sources.notes.max_bytes: does not apply to a source of files; remove it",
    ),
    "unknown corpus": (
        ("corpus: prose", "corpus: pros"),
        "4: sources.prose.corpus: unknown value 'pros'; did you mean 'prose'?",
    ),
    "unknown source in a mixture": (
        ("notes: 0.75", "note: 0.75"),
        "18: stages[1].data.note: unknown source 'note'; did you mean 'notes'?",
    ),
    "unknown source in a list": (
        ("train_on: [prose]", "train_on: [prose, poetry]"),
        "2: tokenizer.train_on[1]: unknown source 'poetry'; known: notes, prose",
    ),
    "negative share": (
        ("prose: 1.0", "prose: -1.0"),
        "11: stages[0].data.prose: should be greater than or equal to 0, got -1.0",
    ),
    "mixture of nothing": (
        ("data: {prose: 1.0}", "data: {prose: 0}"),
        "11: stages[0].data: zero-token mixture: no source has a share above 0",
    ),
    "empty mixture": (
        ("data: {prose: 1.0}", "data: {}"),
        "11: stages[0].data: zero-token mixture: no source has a share above 0",
    ),
    "batch below the context": (
        (
            "batch_tokens: 64\n    context: 32\n    schedule: {kind: c",
            "batch_tokens: 16\n    context: 32\n    schedule: {kind: c",
        ),
        "13: stages[0].batch_tokens: is 16, should be at least context 32",
    ),
    "context above the model's": (
        ("    context: 32\n    schedule: {kind: c", "    context: 33\n    schedule: {kind: c"),
        "14: stages[0].context: is 33, above the model's max_position_embeddings 32",
    ),
    "context above that of the model of the previous stage": (
        ("    context: 32\n    schedule: {kind: i", "    context: 33\n    schedule: {kind: i"),
        "21: stages[1].context: is 33, above the model's max_position_embeddings 32",
    ),
    "vocabulary smaller than the tokenizer's": (
        ("hidden_size: 64,", "hidden_size: 64, vocab_size: 299,"),
        "10: stages[0].model.config.vocab_size: the model's vocab_size 299 is below the "
        "tokenizer's 300; remove it, or shrink the tokenizer",
    ),
    "vocabulary without room for the bytes": (
        ("vocab_size: 300", "vocab_size: 256"),
        "2: tokenizer.vocab_size: should be greater than or equal to 257, got 256",
    ),
    "tokenizer without a size": (
        (", vocab_size: 300", ""),
        "2: tokenizer.vocab_size: missing key; needed with train_on",
    ),
    "tokenizer of both kinds": (
        ("vocab_size: 300", "vocab_size: 300, path: x"),
        "2: tokenizer: expected exactly one of 'train_on' and 'path'",
    ),
    "tokenizer that is not there": (
        ("{train_on: [prose], vocab_size: 300}", "{path: nowhere}"),
        "2: tokenizer.path: 'nowhere' is no directory, expected a transformers tokenizer",
    ),
    "unknown model type": (
        ("model_type: llama", "model_type: lama"),
        "10: stages[0].model.config.model_type: unknown model type 'lama'; did you mean 'llama'?",
    ),
    "model type that is no language model": (
        ("model_type: llama", "model_type: vit"),
        "10: stages[0].model.config.model_type: 'vit' has no causal language model in "
        "transformers, expected one such as llama",
    ),
    "no model type": (
        ("model_type: llama, ", ""),
        "10: stages[0].model.config.model_type: missing key",
    ),
    "key that the config's class ignores": (
        ("hidden_size", "hidden_sise"),
        "10: stages[0].model.config.hidden_sise: unknown key; did you mean 'hidden_size'?",
    ),
    "value that the config's class refuses": (
        ("hidden_size: 64", "hidden_size: wide"),
        "10: stages[0].model.config.hidden_size: Field 'hidden_size' expected int, got str "
        "(value: 'wide')",
    ),
    "values that the config's class refuses together": (
        ("hidden_size: 64", "hidden_size: 15"),
        "10: stages[0].model.config: The hidden size (15) is not a multiple of the number of "
        "attention heads (32).",
    ),
    "first stage from the previous one": (
        (
            "      from: scratch\n      config: {model_type: llama, hidden_size: 64, "
            "max_position_embeddings: 32}",
            "      from: previous",
        ),
        "9: stages[0].model.from: the first stage has no previous one; expected scratch or a "
        "directory",
    ),
    "config without scratch": (
        ("from: previous,", "from: previous, config: {model_type: llama},"),
        "17: stages[1].model.config: applies to `from: scratch` alone; remove it",
    ),
    "scratch without config": (
        ("from: previous,", "from: scratch,"),
        "17: stages[1].model.config: missing key; needed with `from: scratch`",
    ),
    "growing from scratch": (
        ("      from: scratch", "      grow: {zero-depth: {}}\n      from: scratch"),
        "9: stages[0].model.grow: there is nothing to grow from scratch; remove it",
    ),
    "moments from scratch": (
        ("      from: scratch", "      optimizer: keep\n      from: scratch"),
        "9: stages[0].model.optimizer: a model from scratch has no moments to keep; write reset",
    ),
    "name on a hub": (
        ("from: previous", "from: org/model"),
        "17: stages[1].model.from: 'org/model' is not scratch, previous or a checkpoint "
        "directory; names on a hub are not fetched",
    ),
    "unknown operator": (
        ("grow: {stack", "grow: {stak"),
        "17: stages[1].model.grow.stak: unknown operator; did you mean 'stack'?",
    ),
    "unknown option of an operator": (
        ("{factor: 2}", "{facto: 2}"),
        "17: stages[1].model.grow.stack.facto: unknown key; did you mean 'factor'?",
    ),
    "option of another type": (
        ("{factor: 2}", "{factor: two}"),
        "17: stages[1].model.grow.stack.factor: expected a number, got 'two'",
    ),
    "option that the operator refuses": (
        ("{factor: 2}", "{factor: 1}"),
        "17: stages[1].model.grow.stack: factor is 1; expected a number above 1",
    ),
    "two operators": (
        ("{stack: {factor: 2}}", "{stack: {}, zero-depth: {}}"),
        "17: stages[1].model.grow: names 2 operators, expected one",
    ),
    "fraction out of range": (
        ("peak: 3e-3", "peak: 3e-3, warmup: 1.5"),
        "15: stages[0].schedule.warmup: should be less than 1, got 1.5",
    ),
    "fractions that exceed the stage together": (
        ("peak: 0.001", "peak: 0.001, anneal: 0.5"),
        "22: stages[1].schedule.anneal: warmup + cooldown + anneal is 1.12, should be at most 1",
    ),
    "annealing upwards": (
        ("peak: 0.001", "peak: 0.001, min_ratio: 0.9"),
        "22: stages[1].schedule.min_ratio: is above constant_ratio 0.55",
    ),
    "sparse layers": (
        ("    tokens: 1000", "    sparsity: {low_rnk: {rank: 4}}\n    tokens: 1000"),
        "12: stages[0].sparsity.low_rnk: unknown rule; did you mean 'low_rank'?",
    ),
    "list of stages that is a number": (
        (TEXT[TEXT.index("stages:") :], "stages: 3\n"),
        "6: stages: expected a list, got 3",
    ),
    "no stage": (
        (TEXT[TEXT.index("stages:") :], "stages: []\n"),
        "6: stages: should not be empty, got []",
    ),
    "not a mapping": ((TEXT, "- a\n- b\n"), "1: recipe: expected a mapping, got ['a', 'b']"),
    "syntax": (("name: small", "name: a: b"), "1: mapping values are not allowed here"),
    "bracket left open": (
        ("{kind: cosine, peak: 3e-3}", "{kind: cosine"),
        "16: while parsing a flow mapping, expected ',' or '}', but got ':'",
    ),
    "tab": (
        ("    tokens: 1000", "\ttokens: 1000"),
        "12: while scanning for the next token, found character '\\t' that cannot start any token",
    ),
    "alias of itself": ((TEXT, "name: a\nx: &x [*x]\n"), "2: an alias contains itself"),
    "two documents": (
        ("stages:", "--- a\nstages:"),
        "6: expected a single document in the stream, but found another document",
    ),
}


@pytest.mark.parametrize(("edit", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_says_where(write, edit, expected):
    old, new = edit
    assert old in TEXT
    assert refusal(write(TEXT.replace(old, new, 1))) == expected


def test_the_other_mistakes_are_counted(write):
    text = TEXT.replace("tokens: 1000", "tokens: 0").replace("peak", "peek")
    # beside it, an unknown key in each of the two schedules
    first = "12: stages[0].tokens: should be greater than 0, got 0 (and 2 more)"
    assert refusal(write(text)) == first


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"", "is empty, expected a recipe with stages", id="no byte"),
        pytest.param(b"# a comment\n", "is empty, expected a recipe with stages", id="no data"),
        pytest.param(b"\xff\xfe\x00", "is not UTF-8 text, expected a recipe (YAML)", id="no UTF-8"),
        pytest.param(b"a: \x00\x01", "is not text, expected a recipe (YAML)", id="control bytes"),
    ],
)
def test_files_that_are_no_recipe(write, content, expected):
    assert refusal(write(content)).strip() == expected


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.yaml: no such recipe$"):
        load_recipe(tmp_path / "x.yaml")
    with pytest.raises(IsADirectoryError, match=r": is a directory, expected a recipe"):
        load_recipe(tmp_path)


def test_a_merge_of_anchors_is_read(write):
    text = TEXT.replace("  - name: first", "  - &first\n    name: first")
    text += "  - {<<: *first, name: third, model: {from: previous}, seed: 1}\n"
    assert refusal(write(text)).startswith("24: stages[2].seed: unknown key;")
    recipe = load_recipe(write(text.replace(", seed: 1", "")))
    assert recipe.stages[2].schedule == recipe.stages[0].schedule


OVERRIDES = {
    "stage": ("second.tokens=7", lambda r: r.stages[1].tokens, 7),
    "top level": ("seed=7", lambda r: r.seed, 7),
    "scientific notation without a dot": (
        "first.schedule.peak=5e-4",
        lambda r: r.stages[0].schedule.peak,
        5e-4,
    ),
    "deep": ("second.model.grow.stack.factor=3", lambda r: r.stages[1].model.operator(), Stack(3)),
    "inside a model's config": (
        "first.model.config.hidden_size=32",
        lambda r: r.stages[0].model.config["hidden_size"],
        32,
    ),
    "mapping in flow style": ("second.data={notes: 1}", lambda r: r.stages[1].data, {"notes": 1}),
    "list in flow style": ("first.evaluate=[notes]", lambda r: r.stages[0].evaluate, ("notes",)),
    "replay switched off": (
        "second.data.prose=0",
        lambda r: r.stages[1].data,
        {"prose": 0, "notes": 0.75},
    ),
    "null": ("first.sparsity=null", lambda r: r.stages[0].sparsity, None),
    "new mapping on the way": (
        "first.optimizer.clip=null",
        lambda r: r.stages[0].optimizer.clip,
        None,
    ),
    "index of a list": ("stages.1.tokens=9", lambda r: r.stages[1].tokens, 9),
    "value that contains =": (
        "sources.notes.files=['a=b']",
        lambda r: r.sources["notes"].files,
        ("a=b",),
    ),
    "source": ("sources.prose.max_bytes=5", lambda r: r.sources["prose"].max_bytes, 5),
}


@pytest.mark.parametrize(("override", "read", "expected"), OVERRIDES.values(), ids=OVERRIDES)
def test_set_changes_one_value(write, override, read, expected):
    path = write(TEXT)
    assert read(load_recipe(path)) != expected or expected is None
    assert read(load_recipe(path, [override])) == expected


def test_the_last_set_wins(write):
    assert load_recipe(write(TEXT), ["seed=1", "seed=2"]).seed == 2


SYNTAX = "expected key=value, as in --set pretrain.tokens=1000"
WRONG_OVERRIDES = {
    "unknown key": ("first.tokns=1", "--set first.tokns: unknown key; did you mean 'tokens'?"),
    "unknown key on the way": (
        "first.schedul.peak=1",
        "--set first.schedul: unknown key; did you mean 'schedule'?",
    ),
    "unknown stage": (
        "frist.tokens=1",
        "--set frist.tokens: no stage or key 'frist'; did you mean 'first'?",
    ),
    "wrong value": ("first.tokens=0", "--set first.tokens: should be greater than 0, got 0"),
    "wrong item of a mapping": (
        "second.data={prse: 1}",
        "--set second.data.prse: unknown source 'prse'; did you mean 'prose'?",
    ),
    "wrong item of a list": (
        "first.evaluate=[prse]",
        "--set first.evaluate[0]: unknown source 'prse'; did you mean 'prose'?",
    ),
    "no value": ("first.tokens", "--set first.tokens: SYNTAX"),
    "no key": ("=3", "--set =3: SYNTAX"),
    "empty part": ("first..tokens=3", "--set first..tokens=3: SYNTAX"),
    "broken YAML": ("first.tokens=[1", "--set first.tokens: '[1' is not valid YAML"),
    "through a plain value": ("seed.x=1", "--set seed.x: 'x' is no key of 0, a plain value"),
    "beyond a list": ("stages.2.tokens=1", "--set stages.2.tokens: '2' is no index of a list of 2"),
}


@pytest.mark.parametrize(("override", "expected"), WRONG_OVERRIDES.values(), ids=WRONG_OVERRIDES)
def test_a_wrong_set_is_named(write, override, expected):
    assert refusal(write("seed: 0\n" + TEXT), override).replace(SYNTAX, "SYNTAX") == expected


def _checkpoint(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _from_directory(directory: Path) -> str:
    grown = f"{{from: '{directory}', grow: {{stack: {{factor: 2}}}}}}"
    return TEXT.replace("{from: previous, grow: {stack: {factor: 2}}}", grown)


def test_the_context_is_held_against_the_default_of_the_models_class(write):
    text = TEXT.replace(", max_position_embeddings: 32", "").replace(
        "batch_tokens: 64", "batch_tokens: 4096"
    )
    expected = "14: stages[0].context: is 4096, above the model's max_position_embeddings 2048"
    assert refusal(write(text.replace("context: 32", "context: 4096", 1))) == expected


def test_a_stage_from_a_directory(write, tmp_path):
    model = _checkpoint(tmp_path / "m", model_type="llama", vocab_size=400)
    recipe = load_recipe(write(_from_directory(model)))
    assert recipe.stages[1].model.from_ == str(model)
    assert recipe.stages[1].model.optimizer == "reset"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(
            {"model_type": "llama", "vocab_size": 299},
            "17: stages[1].model.from: the model's vocab_size 299 is below the tokenizer's 300; "
            "remove it, or shrink the tokenizer",
            id="labels would be out of range",
        ),
        pytest.param(
            {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 16},
            "21: stages[1].context: is 32, above the model's max_position_embeddings 16",
            id="documents would not fit",
        ),
        pytest.param({"vocab_size": 300}, "has no model_type", id="not of transformers"),
        pytest.param({"model_type": "lama"}, "unknown model type 'lama'", id="unknown type"),
    ],
)
def test_a_directory_that_does_not_fit(write, tmp_path, config, expected):
    model = _checkpoint(tmp_path / "m", **config)
    assert expected in refusal(write(_from_directory(model)))


def test_a_directory_with_a_broken_config(write, tmp_path):
    model = _checkpoint(tmp_path / "m")
    (model / "config.json").write_text("{")
    assert "is not readable JSON" in refusal(write(_from_directory(model)))


def test_growing_an_architecture_without_a_table_is_refused_at_the_start(write):
    text = TEXT.replace(
        "{model_type: llama, hidden_size: 64, max_position_embeddings: 32}", "{model_type: mamba}"
    )
    with pytest.raises(NotImplementedError, match="'mamba' has no table"):
        load_recipe(write(text))


def test_smoke_cuts_every_stage(write):
    path = write(TEXT.replace("tokens: 1000", "tokens: 1e9").replace("size: 300", "size: 32000"))
    whole, smoke = load_recipe(path), load_recipe(path, ["smoke=true"])
    assert whole.smoked() is whole
    assert [stage.name for stage in smoke.stages] == [stage.name for stage in whole.stages]
    assert [stage.tokens for stage in smoke.stages] == [8192, 1000]
    assert smoke.tokenizer.vocab_size == 1024
    assert smoke.stages[0].evaluate_tokens == 2048
    # what is small already stays
    assert smoke.stages[0].context == 32
    assert smoke.sources["prose"].max_bytes == 1000
    assert smoke.smoked() == smoke


def test_the_digest_sees_what_is_computed_and_nothing_else(write):
    path = write(TEXT)
    digest = load_recipe(path).digest()
    for same in ("log_every=3", "checkpoint_every=7", "name=other", "second.tokens=1000"):
        assert load_recipe(path, [same]).digest() == digest
    for other in ("seed=1", "second.tokens=1001", "second.data.prose=0.26", "threads=1"):
        assert load_recipe(path, [other]).digest() != digest


def test_differences_are_named(write):
    path = write(TEXT)
    old = load_recipe(path).resolved()
    changes = [
        "first.tokens=2000",
        "second.model.grow={zero-depth: {}}",
        "log_every=3",
        "threads=2",
    ]
    new = load_recipe(path, changes).resolved()
    assert difference(old, copy.deepcopy(old)) == []
    assert difference(old, new) == [
        "threads: None -> 2",
        "stages[0].tokens: 1000 -> 2000",
        "stages[1].model.grow.stack.factor: 2 -> absent",
        "stages[1].model.grow.zero-depth: absent -> {}",
    ]


def test_the_demo_is_three_stages():
    pretrain, grow, go_on = load_recipe(ROOT / "recipes" / "demo.yaml").stages
    assert pretrain.model.from_ == "scratch"
    assert (grow.model.operator(), grow.model.optimizer) == (Stack(factor=2), "keep")
    assert (go_on.data, go_on.model.from_) == ({"code": 0.75, "prose": 0.25}, "previous")
    assert go_on.schedule.warmup > 0


names = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,8}", fullmatch=True)
# words that YAML reads as something else unless they are quoted
texts = st.one_of(
    st.text(min_size=1), st.sampled_from(["no", "1e3", "null", "~", "2026-01-01", "1:30"])
)
fractions = st.floats(0, 0.25)
positives = st.floats(1e-9, 10, exclude_min=True)
counts = st.integers(64, 10**12)


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    reserved = set(Recipe.model_fields)
    sources = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    some = st.lists(st.sampled_from(sources), min_size=1, unique=True)
    stage_names = st.lists(
        names.filter(lambda n: n not in reserved), min_size=1, max_size=3, unique=True
    )

    def source() -> dict[str, Any]:
        files = {"files": draw(st.lists(texts, min_size=1)), "text_field": draw(texts)}
        corpus = {"corpus": draw(st.sampled_from(["prose", "code"])), "max_bytes": draw(counts)}
        return draw(st.sampled_from([files, corpus]))

    def schedule() -> dict[str, Any]:
        shared = {"peak": draw(positives), "warmup": draw(fractions)}
        infinite = {"kind": "infinite", "cooldown": draw(fractions), "anneal": draw(fractions)}
        return shared | draw(st.sampled_from([{"kind": "cosine"}, infinite]))

    def stage(index: int, name: str) -> dict[str, Any]:
        scratch = {"from": "scratch", "config": {"model_type": "llama", "hidden_act": "silu"}}
        grown = {"from": "previous", "grow": {"zero-depth": {"factor": draw(st.integers(2, 9))}}}
        previous = {"from": "previous", "optimizer": draw(st.sampled_from(["keep", "reset"]))}
        return {
            "name": name,
            "model": draw(st.sampled_from([grown, previous])) if index else scratch,
            "data": {name: draw(positives) for name in draw(some)},
            "tokens": draw(counts),
            "batch_tokens": draw(counts),
            "context": 64,
            "schedule": schedule(),
            "evaluate": draw(st.none() | some),
            "kernels": draw(st.booleans()),
        }

    return {
        "name": draw(names),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "tokenizer": {"train_on": draw(some), "vocab_size": draw(st.integers(257, 10**6))},
        "sources": {name: source() for name in sources},
        "threads": draw(st.none() | st.integers(1, 99)),
        "stages": [stage(*pair) for pair in enumerate(draw(stage_names))],
    }


@settings(max_examples=60, deadline=None)
@given(data=recipes())
def test_a_valid_recipe_survives_its_file(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "x.yaml"
    recipe = Recipe.model_validate(data)
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert load_recipe(path).digest() == recipe.digest()
    # the standard reader sees the same data, so that other programs may read a run's recipe
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == recipe.resolved()
