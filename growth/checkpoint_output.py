"""Writes a safetensors checkpoint directory, with memory for one file of it and no more."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from apical._extras import require

from .checkpoint_files import INDEX, WEIGHTS
from .publish import published, require_space

safetensors = require("safetensors", extra="hf", what="writing a checkpoint")
safetensors_torch = require("safetensors.torch", extra="hf", what="writing a checkpoint")

_COPIED = (
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.json",
    "generation_config.json",
    "LICENSE*",
    "merges.txt",
    "NOTICE*",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def check_output(out: Path, max_shard_bytes: int) -> None:
    """Check, before anything is read, that a directory can be written.

    Raises:
        FileExistsError: it exists; nothing is overwritten.
        ValueError: the size of a file is no positive integer.
    """
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists and is not overwritten; remove it or name another")
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes!r}; expected a positive integer")


def write_checkpoint(
    out: Path,
    sizes: Mapping[str, int],
    tensor: Callable[[str], Tensor],
    *,
    texts: Mapping[str, str],
    beside: Path,
    what: str,
    max_shard_bytes: int,
    progress: str | None,
) -> None:
    """Write a directory under another name and rename it when it is whole.

    Args:
        out: the directory; it must not exist.
        sizes: the bytes of every tensor, in the order in which they are written.
        tensor: returns one of them.
        texts: the other files that are new, by name.
        beside: the checkpoint whose tokenizer, generation config and licence are copied.
        what: it is, for messages.
        max_shard_bytes: of a file, unless one tensor alone is larger.
        progress: what a bar on stderr says is done; None for none.

    Raises:
        OSError: the disk is full; what was written is removed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    require_space(out.parent, sum(sizes.values()), what=what)
    scratch = out.with_name(f"{out.name}.tmp-{secrets.token_hex(4)}")
    with published(out, unfinished=scratch):
        shards = _partition(sizes, max_shard_bytes)
        for file, names in _shown(shards, progress):
            _write_shard(scratch / file, {name: tensor(name) for name in names})
        _write_index(scratch, shards, sum(sizes.values()))
        for name, text in texts.items():
            (scratch / name).write_text(text, encoding="utf-8")
        copy_others(beside, scratch)


def as_json(value: Mapping[str, Any]) -> str:
    """Return a value as the files of a checkpoint hold it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def copy_others(source: Path, out: Path) -> None:
    """Copy what belongs to a checkpoint and has no weights: tokenizer, licence, and the like."""
    for path in sorted({path for pattern in _COPIED for path in source.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, out / path.name)
        else:
            shutil.copyfile(path, out / path.name)


def _partition(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Return file -> tensor names, in order, at most `limit` bytes or one tensor to a file."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not shards:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": names
        for i, names in enumerate(shards, start=1)
    }


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"{path.name} could not be written: {error}") from None


def _write_index(directory: Path, shards: Mapping[str, list[str]], total: int) -> None:
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(as_json(index), encoding="utf-8")


def _shown(
    shards: Mapping[str, list[str]], progress: str | None
) -> Iterable[tuple[str, list[str]]]:
    if progress is None:
        return shards.items()
    tqdm = require("tqdm", extra="train", what="a progress bar")
    return tqdm.tqdm(shards.items(), desc=progress, unit="file")
