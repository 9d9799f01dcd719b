"""What is in a checkpoint directory, and what growing would do to it, from its headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from .apply import as_tied
from .checkpoint_files import read_config, read_headers, with_defaults
from .source import fetched
from .spaces import architecture_of, check_tensors
from .spaces.naming import Naming
from .tensor_file import Stored

_SIZES = ("hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "experts")


def describe_checkpoint(source: str | Path, operators: Mapping[str, type]) -> dict[str, Any]:
    """Return what a checkpoint is as plain data, ready for JSON; no weight is read.

    Args:
        source: directory with config.json and safetensors, or name of a model on the hub.
        operators: name -> growth operator, of which to say whether it keeps the function.

    Raises:
        FileNotFoundError: `source`, its config or its safetensors are not there.
        ValueError: a file is unreadable.
        NotImplementedError: the model's family has no table.

    Source: ours.
    """
    source, name = fetched(source)
    config = with_defaults(read_config(source))
    table = architecture_of(config)
    stored = read_headers(source, integers=True)
    naming = Naming.of(table, stored)
    tensors = {naming.whole(name): tensor for name, tensor in stored.items()}
    config = as_tied(table, config, tensors)
    sizes = table.sizes(config)
    weights = [t for name, t in tensors.items() if not table.is_derived(name)]
    return {
        "checkpoint": name,
        "family": config["model_type"],
        "head": naming.whole_model,
        "layers": config[table.depth_key],
        "sizes": {space: sizes[space] for space in _SIZES if space in sizes},
        "tied": bool(config.get("tie_word_embeddings")),
        "parameters": sum(math.prod(tensor.shape) for tensor in weights),
        "tensors": len(stored),
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in stored.values())),
        "bytes": sum(tensor.nbytes for tensor in stored.values()),
        "files": len({tensor.file for tensor in stored.values()}),
        "accounted": _check(config, tensors, naming),
        "operators": {name: _effect(kind, config) for name, kind in operators.items()},
    }


def format_checkpoint(info: Mapping[str, Any]) -> str:
    """Return what `describe_checkpoint` found as aligned lines of text."""
    sizes = ", ".join(f"{name} {size}" for name, size in info["sizes"].items())
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in info["dtypes"].items())
    files = "1 file" if info["files"] == 1 else f"{info['files']} files"
    lines = [
        ("checkpoint", info["checkpoint"]),
        ("family", info["family"] + ("" if info["head"] else ", without its head")),
        ("layers", str(info["layers"])),
        ("sizes", sizes),
        ("parameters", f"{info['parameters']:,}"),
        ("embeddings", "tied" if info["tied"] else "not tied"),
        ("tensors", f"{info['tensors']}: {dtypes}"),
        ("bytes", f"{info['bytes']:,} in {files}"),
        ("accounted", info["accounted"]),
        ("", ""),
        *info["operators"].items(),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in lines)


def _check(config: Mapping[str, Any], tensors: Mapping[str, Stored], naming: Naming) -> str:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        check_tensors(config, shapes, head=naming.whole_model)
    except ValueError as error:
        return f"no: {error}"
    return f"every one of {len(tensors)} tensors is one of a {config['model_type']}"


def _effect(kind: type, config: Mapping[str, Any]) -> str:
    """Return what an operator does to the function of a model, with its options as they are."""
    needed = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING]
    if needed:
        return f"depends on {', '.join(needed)}"
    try:
        plan = kind().plan(config)
    except (ValueError, NotImplementedError) as error:
        return f"not with its defaults: {error}"
    if plan.preserves_function:
        return "keeps the function"
    return "changes the function" + (f": {'; '.join(plan.notes)}" if plan.notes else "")
