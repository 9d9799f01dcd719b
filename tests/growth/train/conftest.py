"""A recipe of three stages that trains in a second, on two sources of made-up text."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apical.growth.train.recipe.schema import Recipe
from apical.growth.train.results import report
from apical.growth.train.results.metrics import TIMING_KEYS, read_metrics
from apical.growth.train.run import train

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
# 5, 4 and 4 steps of 96 tokens: no multiple of checkpoint_every or log_every
STAGE = {
    "data": {"prose": 1.0},
    "tokens": 4 * 96,
    "batch_tokens": 96,
    "context": 24,
    "schedule": {"kind": "cosine", "peak": 1e-2, "warmup": 0.25},
    "evaluate_tokens": 96,
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two files of documents, from 1 to 60 words long."""
    root = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for name, words in {
        "prose": "the plant grows at its tip",
        "code": "def return x y = 1 if",
    }.items():
        texts = [
            " ".join(draw.choices(words.split(), k=draw.choice([1, 5, 20, 60]))) for _ in range(60)
        ]
        lines = [json.dumps({"text": f"{number} {text}"}) for number, text in enumerate(texts)]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def build(corpus: Path, **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "name": "tiny",
        "tokenizer": {"train_on": ["prose", "code"], "vocab_size": 280},
        "sources": {
            name: {"files": [str(corpus / f"{name}.jsonl")], "validation": 0.2}
            for name in ("prose", "code")
        },
        "checkpoint_every": 2,
        "log_every": 3,
        "threads": 1,
        "stages": [
            STAGE
            | {"name": "pretrain", "tokens": 5 * 96 - 1}
            | {"model": {"from": "scratch", "config": MODEL}},
            STAGE
            | {"name": "grow", "objective": {"z_loss": 1e-3}}
            | {"model": {"from": "previous", "grow": {"stack": {"factor": 2}}}},
            STAGE
            | {"name": "continue", "data": {"code": 0.75, "prose": 0.25}}
            | {"model": {"from": "previous"}}
            | {"schedule": {"kind": "infinite", "peak": 1e-2}},
        ],
    }
    return Recipe.model_validate(data | changes)


@pytest.fixture
def make_recipe(
    corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Recipe]:
    """Return a function that makes the recipe, with top-level keys replaced."""
    monkeypatch.setenv("APICAL_CACHE", str(cache))
    return functools.partial(build, corpus)


@pytest.fixture
def tiny_recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe()


@pytest.fixture(scope="session")
def finished(corpus: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run of the recipe; tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APICAL_CACHE", str(cache))
        return train(build(corpus), output=tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing, which takes longer than such a run and has tests of its own."""
    monkeypatch.setattr(report, "draw_curves", lambda records, comparison: "<svg></svg>")


@pytest.fixture
def outcome() -> Callable[[Path], tuple[list[dict[str, Any]], bytes]]:
    """Return a function of a run directory: its records without timing, and its weights."""

    def read(root: Path) -> tuple[list[dict[str, Any]], bytes]:
        records = [
            {key: value for key, value in record.items() if key not in TIMING_KEYS}
            for record in read_metrics(root / "metrics.jsonl")
        ]
        return records, (root / "checkpoint" / "model.safetensors").read_bytes()

    return read
