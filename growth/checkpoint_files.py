"""Reads a safetensors checkpoint directory: its config, and where its tensors lie."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from apical._extras import require

from .spaces import architecture_of
from .tensor_file import Stored, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


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
        return read_header(source / WEIGHTS, integers=integers)
    listed = read_json(source / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{source / INDEX} has no weight_map; write the checkpoint again")
    stored: dict[str, Stored] = {}
    for file in sorted(set(listed.values())):
        if not (source / file).is_file():
            raise FileNotFoundError(f"{source / file} is in the index but not in the directory")
        stored |= read_header(source / file, integers=integers)
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


def fingerprint(stored: Mapping[str, Stored], *parts: Any) -> str:
    """Return a text that differs if the tensors, their files or `parts` (as JSON) do."""
    files = sorted({tensor.file for tensor in stored.values()})
    told = {
        "tensors": [(n, t.file.name, t.start, t.shape, str(t.dtype)) for n, t in stored.items()],
        "files": [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files],
        "parts": parts,
        "version": version("apical"),
    }
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
