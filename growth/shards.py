"""Runs a plan over a checkpoint directory, with memory for one output shard and no more."""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apical._extras import require

from .apply import grow_tensor
from .checkpoint_files import INDEX, WEIGHTS, Stored, read_config, read_headers, with_defaults
from .plan import GrowthPlan, Operator
from .publish import published, require_space
from .spaces import architecture_of, check_tensors

safetensors = require("safetensors", extra="hf", what="apical.grow_checkpoint")
safetensors_torch = require("safetensors.torch", extra="hf", what="apical.grow_checkpoint")

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


def grow_checkpoint(
    source: str | Path,
    out: str | Path,
    operator: Operator,
    *,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = False,
) -> GrowthPlan:
    """Grow a checkpoint directory into another one, and return the plan that did it.

    `out` is a stock transformers directory: safetensors, config, tokenizer files, a model card,
    and the plan in apical_growth.json. It is written under another name beside `out` and renamed
    when it is whole, so that `out` is complete or not there. Memory: one output shard and one
    tensor, whatever the size of the model.

    Precision: copied weights are bit for bit the old ones, in their own dtypes.

    Args:
        source: directory with config.json and model.safetensors, or the index of its shards.
        out: directory to make; its parents are made too.
        operator: for example `apical.Stack(factor=2)`.
        max_shard_bytes: size of an output file, unless one tensor alone is larger.
        progress: show a progress bar on stderr.

    Raises:
        FileExistsError: `out` exists; nothing is overwritten.
        FileNotFoundError: `source`, its config or its safetensors are not there.
        ValueError: a file of `source` is unreadable, or its tensors are not those of its family.
        NotImplementedError: the model's family has no table in growth/spaces.py.
        OSError: the disk is full; what was written is removed.

    Source: ours.
    """
    source, out = Path(source), Path(out)
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists and is not overwritten; remove it or name another")
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes!r}; expected a positive integer")
    config = read_config(source)
    full = with_defaults(config)
    stored = read_headers(source)
    plan = operator.plan(full)
    check_tensors(full, {name: tensor.shape for name, tensor in stored.items()})
    sizes = {name: stored[plan.sources(name).terms[0][0]].nbytes for name in plan.names(stored)}
    out.parent.mkdir(parents=True, exist_ok=True)
    require_space(out.parent, sum(sizes.values()), what="the grown checkpoint")
    scratch = out.with_name(f"{out.name}.tmp-{secrets.token_hex(4)}")
    with published(out, unfinished=scratch):
        shards = _partition(sizes, max_shard_bytes)
        for file, names in _shown(shards, progress):
            _write_shard(scratch / file, names, plan, stored)
        _write_index(scratch, shards, sum(sizes.values()))
        _write_json(scratch / "config.json", plan.grown_config(config | _per_layer(full)))
        _write_json(scratch / "apical_growth.json", plan.to_dict())
        (scratch / "README.md").write_text(_card(source, plan), encoding="utf-8")
        _copy_others(source, scratch)
    return plan


def _per_layer(full: Mapping[str, Any]) -> dict[str, Any]:
    """Return the per-layer lists; older configs leave them to be computed from the depth."""
    return {key: full[key] for key in architecture_of(full).per_layer_keys if full.get(key)}


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


def _write_shard(
    path: Path, names: list[str], plan: GrowthPlan, stored: Mapping[str, Stored]
) -> None:
    tensors = {n: grow_tensor(plan.sources(n), lambda old: stored[old].read()) for n in names}
    try:
        safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"{path.name} could not be written: {error}") from None


def _write_index(directory: Path, shards: Mapping[str, list[str]], total: int) -> None:
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / INDEX, index)


def _shown(shards: Mapping[str, list[str]], progress: bool) -> Iterable[tuple[str, list[str]]]:
    if not progress:
        return shards.items()
    tqdm = require("tqdm", extra="train", what="a progress bar")
    return tqdm.tqdm(shards.items(), desc="growing", unit="file")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_others(source: Path, out: Path) -> None:
    for path in sorted({path for pattern in _COPIED for path in source.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, out / path.name)
        else:
            shutil.copyfile(path, out / path.name)


def _card(source: Path, plan: GrowthPlan) -> str:
    kept = (
        "computes what the source computes"
        if plan.preserves_function
        else "is to be trained further"
    )
    return (
        "---\nlibrary_name: transformers\ntags: [apical, model-growth]\n---\n\n"
        f"# {source.resolve().name}, grown by {plan.operator}\n\n"
        f"This checkpoint was grown from `{source.resolve().name}` by apical; it {kept}. "
        "It loads with plain `AutoModelForCausalLM.from_pretrained`. The whole plan is in "
        f"`apical_growth.json`.\n\n```\n{plan}\n```\n"
    )
