"""What models must have in common to be merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint_files import read_json

# of a config, what changes nothing that a model computes from a prompt
_IGNORED = (
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
_IGNORED_PARTS = ("dropout", "initializer", "_token_id", "aux_loss", "id2label", "label2id")
_VOCABULARIES = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")


class Described(NamedTuple):
    """A tensor of one of the models: enough to compare without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def check_configs(labels: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> None:
    """Check that configs, with their defaults filled in, describe the same computation.

    Raises:
        ValueError: a key differs, or weights are products (sparse layers, quantised weights), whose
            factors cannot be averaged.
    """
    for label, config in zip(labels, configs, strict=True):
        if config.get("apical"):
            raise ValueError(
                f"{label} has sparse layers, whose parts cannot be merged; export it first: "
                "`apical export-dense SRC OUT`, or apical.export_dense(model)"
            )
        if config.get("quantization_config"):
            raise ValueError(
                f"{label} is quantised, and its scales belong to its own weights; expected a "
                "checkpoint in float32, float16 or bfloat16"
            )
        for key in ["model_type", "vocab_size", *sorted({*configs[0], *config})]:
            here, there = configs[0].get(key), config.get(key)
            ignored = key in _IGNORED or any(part in key for part in _IGNORED_PARTS)
            if here != there and not ignored:
                raise ValueError(
                    f"{key} is {there!r} in the config of {label} and {here!r} in that of "
                    f"{labels[0]}; expected models of one architecture"
                )


def check_tokenizers(directories: Sequence[Path]) -> None:
    """Check that checkpoints number the same tokens in the same way.

    A checkpoint without tokenizer files is not compared.

    Raises:
        ValueError: two of them do not.
    """
    seen: dict[str, tuple[Path, Any]] = {}
    for directory in directories:
        for name, content in _tokenizer(directory).items():
            first, expected = seen.setdefault(name, (directory, content))
            if content != expected:
                raise ValueError(
                    f"{name} of {directory} and {first} differ; expected models with the same "
                    "tokenizer: rows of their embeddings mean different tokens"
                )


def check_tensors(labels: Sequence[str], models: Sequence[Mapping[str, Described]]) -> None:
    """Check that models have the same tensors, and that those of integers are equal.

    Raises:
        ValueError: one is missing, of another shape or kind, or its integers differ.
    """
    for label, model in zip(labels[1:], models[1:], strict=True):
        if odd := sorted(models[0].keys() ^ model.keys()):
            has, lacks = (label, labels[0]) if odd[0] in model else (labels[0], label)
            raise ValueError(
                f"{odd[0]} is in {has} and not in {lacks} ({len(odd)} tensors differ); expected "
                "models with the same tensors"
            )
        for name, tensor in models[0].items():
            _check_pair(name, (labels[0], label), (tensor, model[name]))


def _check_pair(name: str, labels: tuple[str, str], tensors: tuple[Described, Described]) -> None:
    (here, there), (one, other) = labels, tensors
    if one.shape != other.shape:
        raise ValueError(
            f"{name} has shape {one.shape} in {here} and {other.shape} in {there}; expected "
            "the same"
        )
    whole = [not tensor.dtype.is_floating_point for tensor in tensors]
    if any(whole) and not (all(whole) and _equal(one, other)):
        raise ValueError(
            f"{name} holds {one.dtype} in {here}, and others ({other.dtype}) in {there}; integers "
            "cannot be merged, expected equal ones"
        )


def _equal(one: Described, other: Described) -> bool:
    first = one.read()
    return torch.equal(first, other.read().to(first.device))


def _tokenizer(directory: Path) -> dict[str, Any]:
    """Return what numbers the tokens of a checkpoint, by file."""
    found: dict[str, Any] = {
        name: (directory / name).read_bytes()
        for name in _VOCABULARIES
        if (directory / name).is_file()
    }
    if (directory / "tokenizer.json").is_file():
        content = read_json(directory / "tokenizer.json")
        added = {token["id"]: token["content"] for token in content.get("added_tokens", [])}
        # not the rest: padding, truncation and templates number no tokens
        kept = ("model", "normalizer", "pre_tokenizer")
        found["tokenizer.json"] = ([content.get(key) for key in kept], added)
    return found
