"""The recipe: one YAML file, a list of stages, is the only way to configure a run."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from .checks import check_model, check_recipe, make_operator
from .document import apply_override, dump, read_document
from .errors import RecipeError
from .fields import Count, Fraction, Name, Strict
from .objective import Causal, Objective
from .sparsity import DENSE, Sparsity, make_rule

if TYPE_CHECKING:
    from ...sparse import Rule

# they change what is written, not what is computed: a resumed run may differ in them
OUTPUT_ONLY = ("name", "log_every", "checkpoint_every")
# the smoke run is about every part being used once, not about learning
_SMOKE_LIMITS = {"tokens": 8192, "batch_tokens": 1024, "context": 128, "evaluate_tokens": 2048}


class Source(Strict):
    """Where text comes from: a built-in local corpus or files."""

    corpus: Literal["prose", "code"] | None = None
    max_bytes: Count | None = None
    files: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    text_field: str = "text"
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.05

    @model_validator(mode="after")
    def _one_kind(self) -> "Source":
        if (self.corpus is None) == (self.files is None):
            raise ValueError("expected exactly one of 'corpus' and 'files'")
        alien = {"text_field", "validation"} if self.corpus else {"max_bytes"}
        for name in alien:
            if getattr(self, name) != type(self).model_fields[name].default:
                kind = "corpus" if self.corpus else "files"
                raise RecipeError((name,), f"does not apply to a source of {kind}; remove it")
        return self


class Tokenizer(Strict):
    """A byte-level BPE trained on sources, or a transformers tokenizer directory."""

    train_on: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    # 256 bytes and the end-of-text token
    vocab_size: Annotated[int, Field(ge=257)] | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "Tokenizer":
        if (self.train_on is None) == (self.path is None):
            raise ValueError("expected exactly one of 'train_on' and 'path'")
        if self.train_on and self.vocab_size is None:
            raise RecipeError(("vocab_size",), "missing key; needed with train_on")
        if self.path and self.vocab_size is not None:
            raise RecipeError(
                ("vocab_size",), "does not apply to a tokenizer with a path; remove it"
            )
        return self


class ModelSource(Strict):
    """Where a stage's model comes from, and how it is grown before the stage."""

    from_: Annotated[str, Field(alias="from", min_length=1)]
    config: dict[str, Any] | None = None
    grow: dict[str, dict[str, Any] | None] | None = None
    optimizer: Literal["keep", "reset"] = "reset"

    @model_validator(mode="before")
    @classmethod
    def _keep_what_exists(cls, data: Any) -> Any:
        # only the previous stage leaves moments to keep
        previous = isinstance(data, dict) and data.get("from") == "previous"
        return {"optimizer": "keep", **data} if previous else data

    @model_validator(mode="after")
    def _check(self) -> "ModelSource":
        check_model(self)
        return self

    def operator(self) -> Any:
        """Return the growth operator of this stage, or None."""
        if self.grow is None:
            return None
        ((name, options),) = self.grow.items()
        return make_operator(name, options or {})


class CosineSchedule(Strict):
    """Re-warming and cosine decay; `warmup` is a fraction of the stage's steps."""

    kind: Literal["cosine"]
    peak: Annotated[float, Field(gt=0)]
    warmup: Fraction = 0.02
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1


class InfiniteSchedule(Strict):
    """Cool-down to a constant, then annealing; lengths are fractions of the stage's steps."""

    kind: Literal["infinite"]
    peak: Annotated[float, Field(gt=0)]
    warmup: Fraction = 0.02
    cooldown: Fraction = 0.6
    constant_ratio: Annotated[float, Field(gt=0, le=1)] = 0.55
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    shape: Literal["cosine", "isqrt"] = "cosine"
    timescale: Annotated[float, Field(gt=0)] = 10.0
    anneal: Fraction = 0.15

    @model_validator(mode="after")
    def _fits(self) -> "InfiniteSchedule":
        total = self.warmup + self.cooldown + self.anneal
        # a hair of slack, so that 0.1 + 0.6 + 0.3 fits
        if total > 1 + 1e-9:
            message = f"warmup + cooldown + anneal is {total:g}, should be at most 1"
            raise RecipeError(("anneal",), message)
        if self.min_ratio > self.constant_ratio:
            raise RecipeError(("min_ratio",), f"is above constant_ratio {self.constant_ratio:g}")
        return self


Schedule = Annotated[CosineSchedule | InfiniteSchedule, Field(discriminator="kind")]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Strict):
    """AdamW and the clipping of the gradient's norm; `clip: null` for none.

    `per_layer` takes the steps in the backward pass, so that not all gradients exist at once.
    """

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    per_layer: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    clip: Annotated[float, Field(gt=0)] | None = 1.0

    @model_validator(mode="after")
    def _clips_all_or_none(self) -> "Optimizer":
        if self.per_layer and self.clip is not None:
            message = f"is {self.clip:g}, which needs all gradients at once; per_layer takes null"
            raise RecipeError(("clip",), message)
        return self


class Stage(Strict):
    """One phase: a model, a mixture, an objective, a schedule and a number of tokens."""

    name: Name
    model: ModelSource
    data: dict[str, Annotated[float, Field(ge=0)]]
    tokens: Count
    batch_tokens: Count
    # a piece of one token has no label, and a document may end one token after a full piece
    context: Annotated[Count, Field(ge=3)]
    objective: Objective = Causal()
    schedule: Schedule
    optimizer: Optimizer = Optimizer()
    sparsity: Sparsity = None
    kernels: bool = True
    evaluate: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    evaluate_tokens: Count = 32768

    @model_validator(mode="after")
    def _check(self) -> "Stage":
        if not any(self.data.values()):
            raise RecipeError(("data",), "zero-token mixture: no source has a share above 0")
        if self.batch_tokens < self.context:
            message = f"is {self.batch_tokens}, should be at least context {self.context}"
            raise RecipeError(("batch_tokens",), message)
        if self.objective.kind != "causal" and not self.kernels:
            message = f"is {self.objective.kind}, which needs `kernels: true`"
            raise RecipeError(("objective", "kind"), message)
        return self

    def rule(self) -> "Rule | None":
        """Return the rule by which this stage replaces layers, or None."""
        if not isinstance(self.sparsity, dict):
            return None
        ((name, options),) = self.sparsity.items()
        return make_rule(name, options)

    @property
    def exports(self) -> bool:
        """Whether this stage begins by making its model dense."""
        return self.sparsity == DENSE


class Recipe(Strict):
    """A whole run. Attributes are the keys of the YAML file, except `from_` for `from`."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    tokenizer: Tokenizer
    sources: Annotated[dict[Name, Source], Field(min_length=1)]
    checkpoint_every: Count = 50
    log_every: Count = 10
    smoke: bool = False
    threads: Annotated[int, Field(gt=0)] | None = None
    stages: Annotated[tuple[Stage, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        check_recipe(self)
        return self

    def smoked(self) -> "Recipe":
        """Return the recipe with every stage cut to seconds, if `smoke` is set."""
        if not self.smoke:
            return self
        data = self.resolved()
        for stage in data["stages"]:
            stage.update({key: min(stage[key], most) for key, most in _SMOKE_LIMITS.items()})
        for source in data["sources"].values():
            if source["corpus"]:
                source["max_bytes"] = min(source["max_bytes"] or 400_000, 400_000)
        if data["tokenizer"]["vocab_size"]:
            data["tokenizer"]["vocab_size"] = min(data["tokenizer"]["vocab_size"], 1024)
        data.update(checkpoint_every=min(self.checkpoint_every, 4), log_every=1)
        return Recipe.model_validate(data)

    def resolved(self) -> dict[str, Any]:
        """Return plain data with every default filled in, keys as in the YAML file."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        """Return a recipe file that `load_recipe` reads as this recipe."""
        return dump(self.resolved())

    def digest(self) -> str:
        """Return the SHA-256 of all that decides what is computed."""
        data = {key: value for key, value in self.resolved().items() if key not in OUTPUT_ONLY}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a YAML file, cut short if it says `smoke: true`.

    Args:
        path: of the file.
        overrides: "key=value" texts; a key starts with a stage's name or is a top-level key.

    Raises:
        ValueError: the first mistake, with its line and the number of others.
        OSError: the file cannot be read.
        NotImplementedError: a stage grows an architecture that has no table.
    """
    document = read_document(Path(path))
    for text in overrides:
        apply_override(document, text, Recipe.model_fields)
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        raise ValueError(document.first_mistake(error.errors(include_url=False))) from None
    return recipe.smoked()


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what decides the computation and differs, as "stages[0].tokens: 1000 -> 2000".

    Args:
        old: from `Recipe.resolved()`, perhaps by way of a file.
        new: the same of another recipe.
    """
    before, after = dict(_leaves(old, "")), dict(_leaves(new, ""))
    keys = [*before, *(key for key in after if key not in before)]
    absent = "absent"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in keys
        if before.get(key, absent) != after.get(key, absent) and key not in OUTPUT_ONLY
    ]


def _leaves(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list | tuple) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{at}[{index}]")
    else:
        yield at, value
