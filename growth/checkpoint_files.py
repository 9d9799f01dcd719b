"""Reads a safetensors checkpoint directory: its config, the headers of its files, one tensor."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apical._extras import require

from .spaces import architecture_of

safetensors = require("safetensors", extra="hf", what="reading a checkpoint")

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_INTEGERS = {"U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what it is; read from the header of its file."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def read(self) -> Tensor:
        """Return the tensor; its memory is a map of the file."""
        # opened anew for each tensor: pages of a mapped file count as memory until it is closed
        with safetensors.safe_open(self.file, framework="pt") as file:
            return file.get_tensor(self.name)


def read_config(source: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint whose family is known.

    Raises:
        FileNotFoundError: the directory or its config is not there.
        ValueError: the config is not a JSON object.
        NotImplementedError: the family has no table.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a directory; expected a checkpoint directory")
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json; expected a checkpoint directory")
    config = read_json(source / "config.json")
    architecture_of(config)
    return config


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config as transformers understands it: files leave out what is the default.

    Raises:
        ValueError: transformers refuses the config.
    """
    transformers = require("transformers", extra="hf", what="reading a checkpoint")
    errors = require("huggingface_hub.errors", extra="hf", what="reading a checkpoint")
    try:
        kind = transformers.CONFIG_MAPPING[config["model_type"]]
        return kind.from_dict(dict(config)).to_dict()
    except errors.StrictDataclassError as error:
        why = " ".join(str(error).split())
        raise ValueError(f"config.json is not valid: {why}") from None


def read_headers(source: Path, *, integers: bool = False) -> dict[str, Stored]:
    """Return every tensor of a checkpoint; nothing but headers is read.

    Args:
        source: the directory.
        integers: tensors of integers are expected too.

    Raises:
        FileNotFoundError: the weights, or a shard that the index names, are not there.
        ValueError: a file is unreadable, disagrees with the index, or holds quantised tensors.
    """
    if not (source / INDEX).is_file():
        if not (source / WEIGHTS).is_file():
            raise FileNotFoundError(_no_weights(source))
        return _read_header(source / WEIGHTS, integers=integers)
    listed = read_json(source / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{source / INDEX} has no weight_map; write the checkpoint again")
    stored: dict[str, Stored] = {}
    for file in sorted(set(listed.values())):
        if not (source / file).is_file():
            raise FileNotFoundError(f"{source / file} is in the index but not in the directory")
        stored |= _read_header(source / file, integers=integers)
    odd = {(name, tensor.file.name) for name, tensor in stored.items()} ^ set(listed.items())
    if odd:
        name, file = min(odd)
        raise ValueError(f"{source / INDEX} and {file} disagree about {name}; write them again")
    return stored


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        ValueError: it holds none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def _no_weights(source: Path) -> str:
    if any(source.glob("*.bin")):
        return (
            f"{source} has its weights in .bin files alone; load it with transformers and "
            "save_pretrained it, which writes safetensors"
        )
    return f"{source} has neither {WEIGHTS} nor {INDEX}; expected safetensors weights"


def _read_header(path: Path, *, integers: bool) -> dict[str, Stored]:
    accepted = _DTYPES | _INTEGERS if integers else _DTYPES
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    for name, dtype in dtypes.items():
        if dtype not in accepted:
            known = ", ".join(accepted)
            raise ValueError(f"{path} stores {name} as {dtype}; expected one of {known}")
    return {n: Stored(n, path, shapes[n], accepted[dtypes[n]]) for n in shapes}
