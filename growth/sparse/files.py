"""Converted models on disk: what their config says of the layers, and loading by it."""

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from apical._extras import require
from apical.kernels.sparse_low_rank import Support

from . import layers as kinds
from ._dense import weight_of
from .layers import SparseLowRankLinear, StructuredLinear
from .rules import Rule

Model = TypeVar("Model", bound=nn.Module)

# of from_pretrained's options, those that say which files are meant
_WHICH = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def load(path: str | Path, **options: Any) -> Any:
    """Return the model of a directory that `save_pretrained` wrote, converted or stock.

    Plain `AutoModel.from_pretrained` reports the weights of replaced layers as missing and gives
    them random values; this makes the layers before the weights are read.

    Precision: weights are bit for bit those saved, unless `dtype` asks for another type.

    Args:
        path: a directory, or a name on a hub.
        options: those of `from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        ValueError: the config names no class of transformers, or layers of an unknown kind, or the
            weights are not all there.
        OSError: files are missing.
        ImportError: transformers is not installed.

    Source: ours.
    """
    transformers = require("transformers", extra="hf", what="apical.load")
    which = {key: options[key] for key in _WHICH if key in options}
    config = options.pop("config", None) or transformers.AutoConfig.from_pretrained(path, **which)
    stock = model_class(config)
    wanted = _restoring(stock) if entry_of(config) else stock
    model, found = wanted.from_pretrained(path, config=config, output_loading_info=True, **options)
    model.__class__ = stock
    _check_found(path, found)
    refresh(model)
    return model


def entry_of(config: Any) -> dict[str, Any] | None:
    """Return what a config says of replaced layers; None where there are none.

    {"rules": [{"kind": …, options}], "modules": {name: {"kind": …, arguments of the layer}}}
    """
    entry = config.get("apical") if isinstance(config, Mapping) else getattr(config, "apical", None)
    return entry.get("sparse") if entry else None


def write_entry(model: nn.Module, replaced: Mapping[str, StructuredLinear], rule: Rule) -> None:
    """Say in a transformers model's config which layers it has; other models have no config."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return
    rules = (entry_of(config) or {"rules": []})["rules"]
    rules = [*rules, {"kind": type(rule).__name__} | asdict(rule)]
    set_entry(model, replaced, rules)


def set_entry(
    model: nn.Module, replaced: Mapping[str, StructuredLinear], rules: list[dict[str, Any]]
) -> None:
    """Set what a model's config says of replaced layers, in plain JSON."""
    config: Any = copy.copy(model.config)
    modules = {name: _described(layer) for name, layer in replaced.items()}
    config.apical = {"sparse": {"rules": rules, "modules": modules}}
    replace_config(model, config)


def describe(model: Model) -> Model:
    """Say in a model's config which layers its parts have that were converted by themselves.

    For a converted model that was put into a larger one: call it before `save_pretrained` of that,
    and `apical.load` makes the layers anew. `sparsify` of the larger model does the same.

    Args:
        model: a transformers model; its config is replaced by a copy.

    Raises:
        ValueError: it has no config, or no layer is replaced.

    Source: ours.
    """
    named = model.named_modules(remove_duplicate=False)
    layers = {name: layer for name, layer in named if isinstance(layer, StructuredLinear)}
    if not layers or not hasattr(getattr(model, "config", None), "to_json_string"):
        raise ValueError(f"model is a {type(model).__name__} with {len(layers)} replaced layers; "
                         "expected a transformers model with some")  # fmt: skip
    configs = [getattr(module, "config", None) for module in model.modules()]
    entries = [entry_of(config) for config in {id(config): config for config in configs}.values()]
    set_entry(model, layers, [rule for entry in entries if entry for rule in entry["rules"]])
    return model


def without_entry(config: Any) -> Any:
    """Return a copy of a config that says nothing of replaced layers."""
    config = copy.copy(config)
    del config.apical
    return config


def replace_config(model: nn.Module, config: Any) -> None:
    """Give all modules of a model that share its config another one.

    The old one may be that of other models too, and stays as it is.
    """
    shared = model.config
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = config


def restore_layers(model: Model) -> Model:
    """Replace layers of a stock model as its config says, in place, and return the model.

    The new layers have the dtype and device of the old ones, and initial values.

    Raises:
        ValueError: a layer is of an unknown kind, or is not in the model with that shape.
    """
    entry = entry_of(getattr(model, "config", None)) or {"modules": {}}
    made: dict[nn.Module, StructuredLinear] = {}
    for name, arguments in entry["modules"].items():
        old = _stock_layer(model, name, arguments)
        # one that is used in several places stays one
        if old not in made:
            weight = weight_of(old)
            layer = make_layer(name, arguments, device=weight.device, dtype=weight.dtype)
            made[old] = layer.train(old.training)
            layer.path = name
        model.set_submodule(name, made[old])
    return model


def make_layer(
    name: str,
    arguments: Mapping[str, Any],
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> StructuredLinear:
    """Return a layer as a config describes it; explicit positions are still to be read.

    Raises:
        ValueError: its kind is unknown.
    """
    rest = dict(arguments)
    kind = getattr(kinds, rest.pop("kind"), None)
    if kind is None:
        raise ValueError(
            f"config.json has {name} of kind {arguments['kind']!r}; expected one of "
            f"{', '.join(kinds.__all__)}: a newer apical may have written it"
        )
    if (stored := rest.pop("stored", None)) is not None:
        rest["positions"] = torch.arange(stored, device="cpu")
    return kind(**rest, device=device, dtype=dtype)


def refresh(model: nn.Module) -> None:
    """Make supports those of explicit positions that were read straight into their buffers."""
    for layer in model.modules():
        if isinstance(layer, SparseLowRankLinear) and layer.positions is not None:
            shape = layer.out_features, layer.in_features
            layer.support = Support.explicit(layer.positions.detach().cpu(), *shape)


def model_class(config: Any) -> Any:
    """Return the class of transformers that a config names.

    Raises:
        ValueError: it names none.
    """
    transformers = require("transformers", extra="hf", what="apical.load")
    names = getattr(config, "architectures", None) or ["nothing"]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise ValueError(
            f"config.json has architectures {names[0]!r}; expected a class of transformers"
        )
    return kind


def _described(layer: StructuredLinear) -> dict[str, Any]:
    described = {"kind": type(layer).__name__} | layer.settings()
    if isinstance(layer, SparseLowRankLinear) and layer.positions is not None:
        described["stored"] = layer.positions.numel()
    return described


def _restoring(stock: Any) -> Any:
    """Return a class that is a stock one with the layers of its config, for from_pretrained."""

    def make(self: Any, config: Any, *rest: Any, **options: Any) -> None:
        stock.__init__(self, config, *rest, **options)
        restore_layers(self)

    # transformers looks some of its tables up by the name of the class
    return type(stock.__name__, (stock,), {"__init__": make, "__module__": stock.__module__})


def _stock_layer(model: nn.Module, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"config.json has a layer {name}, which is not in the model") from None
    shape = arguments["out_features"], arguments["in_features"]
    if tuple(weight_of(old).shape) != shape:
        raise ValueError(
            f"config.json has a layer {name} of {shape}, expected {tuple(weight_of(old).shape)}; "
            "were sizes in it changed by hand?"
        )
    return old


def _check_found(path: str | Path, found: Mapping[str, Any]) -> None:
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[key]:
            name = min(map(str, found[key]))
            what = key.replace("_keys", "")
            raise ValueError(
                f"{path} does not hold the model that its config.json says: {name} is {what}"
                f", as are {len(found[key]) - 1} others; write it again with save_pretrained, and "
                "before it call apical.growth.sparse.describe(model) if a part was converted alone"
            )
