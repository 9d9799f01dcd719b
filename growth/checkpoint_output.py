"""Writes a safetensors checkpoint directory, with memory for one tensor; goes on after a kill."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from apical._extras import require

from .checkpoint_files import INDEX, WEIGHTS
from .publish import published, require_space
from .tensor_file import Form, Stored, write_tensors

COMPANIONS = (
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
    forms: Mapping[str, Form],
    tensor: Callable[[str], Tensor | Stored],
    *,
    texts: Mapping[str, str],
    beside: Path,
    same: str,
    what: str,
    max_shard_bytes: int,
    progress: str | None,
) -> None:
    """Write a directory under another name and rename it when it is whole.

    Files that an earlier run had finished when it was killed are kept.

    Args:
        out: the directory; it must not exist.
        forms: of every tensor, in the order in which they are spread over files.
        tensor: returns one of them, or where its bytes lie.
        texts: the other files that are new, by name.
        beside: the checkpoint whose tokenizer, generation config and licence are copied.
        same: what a killed run must have had in common with this one (`fingerprint`).
        what: it is, for messages.
        max_shard_bytes: of a file, unless one tensor alone is larger.
        progress: what a bar on stderr says is done; None for none.

    Raises:
        OSError: the disk is full, or another process writes `out`; what was written is removed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    sizes = {name: form.nbytes for name, form in forms.items()}
    shards, total = _partition(sizes, max_shard_bytes), sum(sizes.values())
    scratch = out.with_name(f"{out.name}.unfinished")
    same = f"{same}, files of {max_shard_bytes} bytes\n"
    with published(out, unfinished=scratch, same=same), _counter(progress, total) as wrote:
        kept = {name for file in shards if (scratch / file).exists() for name in shards[file]}
        wrote(sum(sizes[name] for name in kept))
        require_space(out.parent, sum(sizes[name] for name in forms if name not in kept), what=what)
        for file, names in shards.items():
            if not (scratch / file).exists():
                part = {name: forms[name] for name in names}
                write_tensors(scratch / file, part, tensor, wrote=wrote)
        _write_index(scratch, shards, total)
        for name, text in texts.items():
            (scratch / name).write_text(text, encoding="utf-8")
        copy_others(beside, scratch)


def as_json(value: Mapping[str, Any]) -> str:
    """Return a value as the files of a checkpoint hold it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def copy_others(source: Path, out: Path) -> None:
    """Copy what belongs to a checkpoint and has no weights: tokenizer, licence, and the like."""
    for path in sorted({path for pattern in COMPANIONS for path in source.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
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


def _write_index(directory: Path, shards: Mapping[str, list[str]], total: int) -> None:
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(as_json(index), encoding="utf-8")


@contextmanager
def _counter(progress: str | None, total: int) -> Iterator[Callable[[int], object]]:
    """Give what is to be told of written bytes: a bar, or nothing."""
    if progress is None:
        yield lambda count: None
        return
    tqdm = require("tqdm", extra="train", what="a progress bar")
    with tqdm.tqdm(total=total, desc=progress, unit="B", unit_scale=True) as bar:
        yield bar.update
