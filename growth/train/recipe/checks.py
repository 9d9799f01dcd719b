"""What a recipe's schema cannot say: known operators and models, and stages that fit together.

transformers takes seconds to import, so it is imported when there is a config to check.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from apical._extras import require

from ...operators import OPERATORS
from ...spaces import architecture_of
from .errors import Location, RecipeError, describe, did_you_mean, unknown_key

if TYPE_CHECKING:
    from .objective import Objective
    from .schema import ModelSource, Recipe, Stage

# keys that transformers takes from a config file without a field of that name
_LEGACY_KEYS = ("model_type", "torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor")


def make_operator(
    name: str,
    options: Mapping[str, Any],
    table: Mapping[str, Any] = OPERATORS,
    *,
    what: str = "operator",
) -> Any:
    """Return a growth operator, or what another table holds, from its name and its options.

    Raises:
        RecipeError: the operator or an option is unknown, or an option has a wrong value.
    """
    if name not in table:
        raise RecipeError((name,), f"unknown {what}; {did_you_mean(name, table)}")
    operator = table[name]
    known = [field.name for field in fields(operator)]
    for key in options:
        if key not in known:
            raise _at((name,), unknown_key(key, known))
    try:
        # strict validation makes dataclasses from JSON, not from a dict
        return TypeAdapter(operator).validate_json(json.dumps(options), strict=True)
    except ValidationError as error:
        location, message = describe(error.errors()[0])
        raise RecipeError((name, *location), message) from None


def check_model(model: "ModelSource") -> None:
    """Check a stage's `model` on its own.

    Raises:
        RecipeError: its keys contradict each other, or a name in it is unknown.
    """
    if model.from_ == "scratch":
        _check_scratch(model)
    elif model.config is not None:
        raise RecipeError(("config",), "applies to `from: scratch` alone; remove it")
    elif model.from_ != "previous":
        _check_directory(model)
    if model.grow is not None:
        if len(model.grow) != 1:
            raise RecipeError(("grow",), f"names {len(model.grow)} operators, expected one")
        try:
            model.operator()
        except RecipeError as error:
            raise _at(("grow",), error) from None


def check_recipe(recipe: "Recipe") -> None:
    """Check that names are known and that the stages fit to each other and to the tokenizer.

    Raises:
        RecipeError: they do not.
        NotImplementedError: a stage grows an architecture that has no table.
    """
    # it makes rules by the function above
    from .sparsity import before_growth

    _check_names(recipe)
    _check_sources(recipe)
    if recipe.tokenizer.path and not Path(recipe.tokenizer.path).is_dir():
        message = f"'{recipe.tokenizer.path}' is no directory, expected a transformers tokenizer"
        raise RecipeError(("tokenizer", "path"), message)
    config: dict[str, Any] = {}
    for index, stage in enumerate(recipe.stages):
        if stage.model.from_ == "scratch":
            config = _full_config(stage.model.config or {})
        elif stage.model.from_ != "previous":
            config = _directory_config(stage.model.from_)
        elif index == 0:
            message = "the first stage has no previous one; expected scratch or a directory"
            raise RecipeError(("stages", 0, "model", "from"), message)
        try:
            config = before_growth(stage, config)
            _check_stage(recipe, index, config)
        except RecipeError as error:
            raise _at(("stages", index), error) from None
        if stage.rule() is not None:
            config = config | {"apical": {"sparse": stage.sparsity}}


def _check_names(recipe: "Recipe") -> None:
    names = [stage.name for stage in recipe.stages]
    for index, name in enumerate(names):
        place = ("stages", index, "name")
        if name in names[:index]:
            message = f"'{name}' is also the name of stages[{names.index(name)}], expected another"
            raise RecipeError(place, message)
        if name in type(recipe).model_fields:
            raise RecipeError(place, f"'{name}' is a key of the recipe itself, expected another")


def _check_sources(recipe: "Recipe") -> None:
    named: dict[Location, Iterable[str]] = {
        ("tokenizer", "train_on"): recipe.tokenizer.train_on or ()
    }
    for index, stage in enumerate(recipe.stages):
        named["stages", index, "data"] = stage.data
        named["stages", index, "evaluate"] = stage.evaluate or ()
    for place, names in named.items():
        for index, name in enumerate(names):
            if name not in recipe.sources:
                part = name if isinstance(names, Mapping) else index
                hint = did_you_mean(name, recipe.sources)
                raise RecipeError((*place, part), f"unknown source '{name}'; {hint}")


def _check_stage(recipe: "Recipe", index: int, config: dict[str, Any]) -> None:
    stage = recipe.stages[index]
    longest = config.get("max_position_embeddings")
    if longest is not None and stage.context > longest:
        message = f"is {stage.context}, above the model's max_position_embeddings {longest}"
        raise RecipeError(("context",), message)
    _check_vocabulary(recipe, index, config)
    _check_teacher(stage.objective, first=index == 0)
    if stage.model.optimizer == "keep":
        _check_kept(stage, recipe.stages[index - 1])
    if stage.model.grow is not None:
        # here and not when the stage begins, which may be days later
        architecture_of(config)


def _check_kept(stage: "Stage", before: "Stage") -> None:
    kind, place = stage.optimizer.kind, ("model", "optimizer")
    if kind != before.optimizer.kind:
        message = f"is keep, but the moments are those of {before.optimizer.kind}, not {kind}"
        raise RecipeError(place, f"{message}; write reset")
    if stage.model.grow is not None and kind != "adamw":
        raise RecipeError(place, f"is keep, but moments of {kind} cannot grow; write reset")


def _check_teacher(objective: "Objective", *, first: bool) -> None:
    if objective.kind != "salt":
        return
    place = ("objective", "teacher")
    if objective.teacher_directory is not None:
        try:
            _directory_config(objective.teacher_directory, expected="previous")
        except (RecipeError, OSError) as error:
            raise RecipeError(place, " ".join(str(error).split())) from None
    elif first:
        raise RecipeError(place, "the first stage has no previous one; expected a directory")


def _check_vocabulary(recipe: "Recipe", index: int, config: dict[str, Any]) -> None:
    model, wanted = recipe.stages[index].model, recipe.tokenizer.vocab_size
    given = model.from_ not in ("scratch", "previous") or "vocab_size" in (model.config or {})
    size = config.get("vocab_size")
    if given and wanted is not None and size is not None and size < wanted:
        key = ("from",) if model.config is None else ("config", "vocab_size")
        message = f"the model's vocab_size {size} is below the tokenizer's {wanted}"
        raise RecipeError(("model", *key), f"{message}; remove it, or shrink the tokenizer")


def _check_scratch(model: "ModelSource") -> None:
    if model.config is None:
        raise RecipeError(("config",), "missing key; needed with `from: scratch`")
    if model.grow is not None:
        raise RecipeError(("grow",), "there is nothing to grow from scratch; remove it")
    _refuse_keep(model, "a model from scratch")
    if "model_type" not in model.config:
        raise RecipeError(("config", "model_type"), "missing key")
    try:
        _full_config(model.config, strict=True)
    except RecipeError as error:
        raise _at(("config",), error) from None


def _check_directory(model: "ModelSource") -> None:
    try:
        _directory_config(model.from_)
    except (RecipeError, OSError) as error:
        raise RecipeError(("from",), " ".join(str(error).split())) from None
    _refuse_keep(model, "a checkpoint directory")


def _refuse_keep(model: "ModelSource", what: str) -> None:
    if model.optimizer == "keep":
        raise RecipeError(("optimizer",), f"{what} has no moments to keep; write reset")


def _directory_config(directory: str, *, expected: str = "scratch, previous") -> dict[str, Any]:
    path = Path(directory) / "config.json"
    if not path.is_file():
        message = f"'{directory}' is not {expected} or a checkpoint directory"
        raise RecipeError((), f"{message}; names on a hub are not fetched")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError((), f"{path} is not readable JSON: {error}") from None
    if not isinstance(data, dict) or "model_type" not in data:
        raise RecipeError((), f"{path} has no model_type, expected a transformers checkpoint")
    return _full_config(data)


def _full_config(config: dict[str, Any], *, strict: bool = False) -> dict[str, Any]:
    """Return a model's config with every default of its class filled in."""
    transformers = require("transformers", extra="hf", what="a recipe")
    errors = require("huggingface_hub.errors", extra="hf", what="a recipe")
    kind = _config_class(transformers, config["model_type"])
    if strict:
        _check_keys(kind, config)
        _check_sizes(config)
    try:
        return kind(
            **{key: value for key, value in config.items() if key != "model_type"}
        ).to_dict()
    except (errors.StrictDataclassError, ValueError, TypeError) as error:
        raise _config_error(error) from None


def _check_sizes(config: Mapping[str, Any]) -> None:
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        size = config.get(key)
        if isinstance(size, int) and size < 1:
            raise RecipeError((key,), f"is {size}, should be at least 1")
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        message = f"is {shared}, should divide num_attention_heads {heads}"
        raise RecipeError(("num_key_value_heads",), message)


def _config_class(transformers: Any, model_type: object) -> Any:
    auto = transformers.models.auto.modeling_auto
    known = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if model_type in known:
        return transformers.CONFIG_MAPPING[model_type]
    if model_type in transformers.CONFIG_MAPPING:
        message = f"'{model_type}' has no causal language model in transformers"
        raise RecipeError(("model_type",), f"{message}, expected one such as llama")
    hint = did_you_mean(model_type, known)
    raise RecipeError(("model_type",), f"unknown model type '{model_type}'; {hint}")


def _check_keys(kind: Any, config: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(kind)} | set(kind.attribute_map) | set(_LEGACY_KEYS)
    for key in config:
        if key not in known:
            raise unknown_key(key, known)


def _at(place: Location, error: RecipeError) -> RecipeError:
    return RecipeError(place + error.location, str(error))


def _config_error(error: Exception) -> RecipeError:
    # transformers names its validators, then the field, then the type of the error
    text = " ".join(str(error).split())
    field = re.match(r"Validation error for field '(\w+)'", text)
    return RecipeError((field[1],) if field else (), re.sub(r"^.*?Error: ", "", text))
