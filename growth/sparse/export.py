"""Converted models back to stock ones: in memory, and directory to directory."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from apical._extras import require

from ..checkpoint_files import fingerprint, read_headers, read_json
from ..checkpoint_output import as_json, check_output, write_checkpoint
from ..tensor_file import Form, Stored
from ._dense import weight_of
from .convert import replaced
from .files import entry_of, make_layer, model_class, replace_config, without_entry
from .layers import StructuredLinear

Model = TypeVar("Model", bound=nn.Module)


def export_dense(model: Model) -> Model:
    """Replace all replaced layers by stock ones, in place, and return the model.

    The layers are nn.Linear or transformers' Conv1D again, as in the model's class, with the same
    weight as one matrix, in the same dtype, on the same device. The config has no `apical` entry
    any more, so `save_pretrained` writes a stock directory. An optimizer that was made before has
    parameters that are no longer in the model.

    Precision: weights are summed in at least float32 and rounded once.

    Args:
        model: any model that `apical.sparsify` or `apical.load` returned.

    Raises:
        ValueError: no layer is replaced, or one is not linear in its input and so has no dense
            weight; the model is as it was.

    Source: ours.
    """
    layers = replaced(model)
    if not layers:
        raise ValueError("model has no sparse layers to export; expected a converted one")
    transposed = _transposed(model)
    for name, layer in layers.items():
        _check_linear(name, {"kind": type(layer).__name__} | layer.settings())
    made: dict[StructuredLinear, nn.Module] = {}
    for name, layer in layers.items():
        if layer not in made:
            linear = layer.to_dense()
            made[layer] = _conv1d(linear) if name in transposed else linear
        model.set_submodule(name, made[layer])
    if entry_of(getattr(model, "config", None)):
        replace_config(model, without_entry(model.config))
    return model


def export_dense_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = False,
) -> int:
    """Write a converted model's directory as a stock one; return how many layers were replaced.

    `out` loads with plain `AutoModel.from_pretrained`. Tokenizer, generation config and licence are
    copied. It is written under another name and renamed when it is whole; after a kill, the same
    call goes on. Memory: one layer, whatever the size of the model.

    Precision: weights are summed in at least float32 and rounded once; others are copied.

    Args:
        source: directory that `save_pretrained` wrote.
        out: directory to make; its parents are made too.
        max_shard_bytes: size of an output file, unless one tensor alone is larger.
        progress: show a progress bar on stderr.

    Raises:
        FileExistsError: `out` exists; nothing is overwritten.
        FileNotFoundError: `source`, its config or its safetensors are not there.
        ValueError: a file of `source` is unreadable, or it has no sparse layers, or one that is not
            linear in its input, or lacks tensors of one.
        OSError: the disk is full; what was written is removed.

    Source: ours.
    """
    source, out = Path(source), Path(out)
    check_output(out, max_shard_bytes)
    config = _read_config(source)
    entry = entry_of(config)
    if not entry:
        raise ValueError(f"{source} has no sparse layers to export; expected a converted model")
    stored = read_headers(source, integers=True)
    modules = {name: _Module(name, entry["modules"][name], stored) for name in entry["modules"]}
    transposed = _transposed_of(config)
    forms = _forms(stored, modules, transposed)

    def tensor(name: str) -> Tensor | Stored:
        owner, _, leaf = name.rpartition(".")
        if owner not in modules:
            return stored[name]
        linear = modules[owner].dense()
        if leaf == "weight" and owner in transposed:
            return linear.weight.detach().T.contiguous()
        return linear.get_parameter(leaf).detach()

    rest = {key: value for key, value in config.items() if key != "apical"}
    write_checkpoint(
        out,
        forms,
        tensor,
        texts={"config.json": as_json(rest)},
        beside=source,
        same=fingerprint(stored, config),
        what="the dense checkpoint",
        max_shard_bytes=max_shard_bytes,
        progress="exporting" if progress else None,
    )
    return len(modules)


class _Module:
    """One replaced layer of a checkpoint, and the tensors that belong to it.

    Raises:
        ValueError: tensors are missing, or the layer has no dense weight.
    """

    def __init__(
        self, name: str, arguments: Mapping[str, Any], stored: Mapping[str, Stored]
    ) -> None:
        self.name, self.arguments = name, arguments
        _check_linear(name, arguments)
        expected = make_layer(name, arguments, device="meta").state_dict()
        missing = [leaf for leaf in expected if f"{name}.{leaf}" not in stored]
        if missing:
            raise ValueError(
                f"{name}.{missing[0]} is not in the checkpoint, expected by its config"
            )
        self.tensors = {leaf: stored[f"{name}.{leaf}"] for leaf in expected}
        floating = [t.dtype for t in self.tensors.values() if t.dtype.is_floating_point]
        self.dtype = floating[0]

    def forms(self, *, transposed: bool) -> dict[str, Form]:
        """Return the shapes and dtypes of the dense layer's tensors."""
        with torch.device("meta"):
            layer = make_layer(self.name, self.arguments, device="meta", dtype=self.dtype)
            dense = dict(layer.to_dense().named_parameters())
        step = -1 if transposed else 1
        return {name: Form(tuple(p.shape)[::step], p.dtype) for name, p in dense.items()}

    def dense(self) -> nn.Linear:
        """Return the dense layer."""
        layer = make_layer(self.name, self.arguments, device="meta", dtype=self.dtype)
        read = {leaf: tensor.read() for leaf, tensor in self.tensors.items()}
        layer.load_state_dict(read, assign=True)
        return layer.to_dense()


def _forms(
    stored: Mapping[str, Stored], modules: Mapping[str, _Module], transposed: set[str]
) -> dict[str, Form]:
    """Return the shapes and dtypes of all tensors of the dense model, layers where they were."""
    forms: dict[str, Form] = {}
    for name, tensor in stored.items():
        owner = name.rpartition(".")[0]
        if owner not in modules:
            forms[name] = tensor
        elif f"{owner}.weight" not in forms:
            new = modules[owner].forms(transposed=owner in transposed)
            forms |= {f"{owner}.{leaf}": form for leaf, form in new.items()}
    return forms


def _read_config(source: Path) -> dict[str, Any]:
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json; expected a checkpoint directory")
    return read_json(source / "config.json")


def _check_linear(name: str, arguments: Mapping[str, Any]) -> None:
    rest = {key: value for key, value in arguments.items() if key != "stored"}
    if rest.get("support") == "explicit":
        return
    try:
        make_layer(name, rest, device="meta").to_dense()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _transposed(model: nn.Module) -> set[str]:
    """Return the names of a model's Conv1D layers, also of those that are replaced."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return set()
    stock: Any = type(model)
    return _conv1d_names(stock, copy.deepcopy(config))


def _transposed_of(config: dict[str, Any]) -> set[str]:
    transformers = require("transformers", extra="hf", what="apical export-dense")
    kind = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    return _conv1d_names(model_class(kind), kind)


def _conv1d_names(kind: Any, config: Any) -> set[str]:
    conv1d = require("transformers.pytorch_utils", extra="hf", what="exporting a model").Conv1D
    with torch.device("meta"):
        skeleton = kind(config)
    modules = skeleton.named_modules(remove_duplicate=False)
    return {name for name, module in modules if isinstance(module, conv1d)}


def _conv1d(linear: nn.Linear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        layer: Any = Conv1D(linear.out_features, linear.in_features)
    trained = linear.weight.requires_grad
    weight = weight_of(linear).detach().T.contiguous()
    layer.weight = nn.Parameter(weight, requires_grad=trained)
    layer.bias = linear.bias
    return layer.train(linear.training)
