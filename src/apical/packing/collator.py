"""Features into one packed row with its boundaries, as transformers models take them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import document_bounds, position_ids

_IGNORED = -100
# 1 where a token is to be learned; TRL's names
_LOSS_MASKS = ("completion_mask", "assistant_masks")


@dataclass(frozen=True)
class PackedCollator:
    """Lays features side by side in one row; for transformers' Trainer and for other loops.

    A feature is a mapping with ``input_ids`` and, if it has them:

    - ``labels``: default: the tokens themselves.
    - ``attention_mask``: tokens with 0 are padding and are dropped.
    - ``seq_lengths``: the feature is a row of several documents with these lengths.
    - ``group``: documents next to each other with the same group are one document to attention;
      a value, or one for each of ``seq_lengths``; None is a group of its own.
    - ``token_type_ids``: passed on.
    - ``completion_mask``, ``assistant_masks``: tokens with 0 get no label.

    All else is left out. transformers' Trainer drops ``seq_lengths``, ``group`` and the masks
    before they get here, unless `remove_unused_columns` is False.

    The result has ``input_ids``, ``labels``, ``position_ids`` (1, T) int64, ``cu_seq_lens_q`` and
    ``cu_seq_lens_k`` (N + 1,) int32, ``max_length_q`` and ``max_length_k`` int. Documents without
    tokens are left out.

    Args:
        causal: the model predicts the next token. Labels stay in place, as transformers shifts
            them, and a document's first token gets -100, since nothing before it predicts it.
        mask_tokens: for masked language models: takes all tokens (1, T) and returns the input and
            the labels, such as ``DataCollatorForLanguageModeling(...).torch_mask_tokens``.
        predict_across: within a group, the first token of a following document is predicted.
        position_start: position of a first token; the RoBERTa family has padding_idx + 1.
        pad_to_multiple_of: fill the row up. The padding consists of documents of its own, none
            longer than the longest real one: no attention leaves it undefined, positions stay in
            range, and its labels are -100.
        pad_token_id: token of the padding.
        max_tokens: most tokens that features may hold together; None: any number.

    Raises:
        ValueError: options contradict each other; in a call, features are empty, too long, lack
            ``input_ids``, or have columns of other lengths.

    Source: keys of transformers' DataCollatorWithFlattening; ``seq_lengths`` of TRL's packing.
    """

    causal: bool = True
    mask_tokens: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    predict_across: bool = True
    position_start: int = 0
    pad_to_multiple_of: int | None = None
    pad_token_id: int = 0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.causal and self.mask_tokens is not None:
            raise ValueError("mask_tokens is for masked language models: set causal=False")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of is {self.pad_to_multiple_of}, expected 1 or more")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = [_Row.of(number, feature, self) for number, feature in enumerate(features)]
        documents = [pair for row in rows for pair in zip(row.lengths, row.groups, strict=True)]
        documents = [(length, group) for length, group in documents if length]
        lengths = [length for length, _ in documents]
        self._check_total(sum(lengths), len(rows))
        merged = _merged(documents)
        batch = _columns(rows)
        if self.mask_tokens is not None:
            batch["input_ids"], labels = self.mask_tokens(batch["input_ids"][None])
            batch["input_ids"], batch["labels"] = batch["input_ids"][0], labels[0]
        if self.causal:
            firsts = document_bounds(merged if self.predict_across else lengths)[:-1]
            batch["labels"][firsts.long()] = _IGNORED
        return self._finished(batch, merged)

    def _check_total(self, total: int, rows: int) -> None:
        if total == 0:
            raise ValueError(f"features hold no token in {rows} rows, expected at least one")
        if self.max_tokens is not None and total > self.max_tokens:
            raise ValueError(
                f"{rows} features hold {total} tokens, max_tokens is {self.max_tokens}: lower the"
                " batch size, or choose what goes together by apical.packing.pack"
            )

    def _finished(self, batch: dict[str, Tensor], lengths: list[int]) -> dict[str, Any]:
        longest, total = max(lengths), sum(lengths)
        missing = -total % (self.pad_to_multiple_of or 1)
        lengths = lengths + [longest] * (missing // longest)
        lengths += [missing % longest] if missing % longest else []
        fills = {"input_ids": self.pad_token_id, "labels": _IGNORED}
        rows = {k: pad(v, (0, missing), value=fills.get(k, 0))[None] for k, v in batch.items()}
        bounds = document_bounds(lengths)
        return rows | {
            "position_ids": position_ids(lengths, self.position_start)[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }


@dataclass(frozen=True, eq=False)
class _Row:
    """One feature without its padding, as columns (tokens,) int64 that belong together."""

    number: int
    columns: dict[str, Tensor]
    lengths: list[int]
    groups: list[Any]

    @classmethod
    def of(cls, number: int, feature: Mapping[str, Any], options: PackedCollator) -> "_Row":
        columns = _checked_columns(number, feature)
        mask = columns.pop("attention_mask", None)
        if mask is not None:
            columns = {name: column[mask != 0] for name, column in columns.items()}
        masks = [columns.pop(name) for name in _LOSS_MASKS if name in columns]
        if options.mask_tokens is not None and ("labels" in columns or masks):
            raise ValueError(
                f"feature {number} says what to learn by labels or a mask, and so does mask_tokens:"
                " drop one of them"
            )
        if options.mask_tokens is None and "labels" not in columns:
            if not options.causal:
                raise ValueError(
                    f"feature {number} has no labels: give them, or set mask_tokens to make them"
                )
            columns["labels"] = columns["input_ids"]
        for learned in masks:
            columns["labels"] = columns["labels"].masked_fill(learned == 0, _IGNORED)
        lengths = _lengths(number, feature, len(columns["input_ids"]))
        return cls(number, columns, lengths, _groups(number, feature, lengths))


def _checked_columns(number: int, feature: Mapping[str, Any]) -> dict[str, Tensor]:
    if feature.get("input_ids") is None:
        raise ValueError(
            f"feature {number} has no input_ids, only {sorted(feature)}: tokenize it, and set"
            " remove_unused_columns=False if a trainer took them away"
        )
    if feature.get("position_ids") is not None:
        raise ValueError(
            f"feature {number} has position_ids, which are made here: drop the column, and give"
            " the documents inside a row by seq_lengths"
        )
    names = ("input_ids", "labels", "attention_mask", "token_type_ids", *_LOSS_MASKS)
    given = {name: feature[name] for name in names if feature.get(name) is not None}
    columns = {name: torch.as_tensor(value, dtype=torch.int64) for name, value in given.items()}
    shape = columns["input_ids"].shape
    for name, column in columns.items():
        if column.shape != shape or column.ndim != 1:
            raise ValueError(
                f"feature {number}: {name} has shape {tuple(column.shape)}, expected (tokens,), and"
                f" input_ids has {tuple(shape)}"
            )
    return columns


def _lengths(number: int, feature: Mapping[str, Any], tokens: int) -> list[int]:
    given = feature.get("seq_lengths")
    lengths = [tokens] if given is None else torch.as_tensor(given).tolist()
    if sum(lengths) != tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"feature {number}: seq_lengths are {lengths}, expected lengths that sum to its"
            f" {tokens} tokens, without those that attention_mask drops"
        )
    return lengths


def _groups(number: int, feature: Mapping[str, Any], lengths: list[int]) -> list[Any]:
    group = feature.get("group")
    group = group.tolist() if hasattr(group, "tolist") else group  # pyright: ignore
    if not isinstance(group, (list, tuple)):
        return [group] * len(lengths)
    if len(group) != len(lengths):
        raise ValueError(
            f"feature {number}: group has {len(group)} entries, expected one for each of its"
            f" {len(lengths)} documents"
        )
    return list(group)


def _merged(documents: list[tuple[int, Any]]) -> list[int]:
    """Return the lengths of what attention takes for documents, from lengths and groups."""
    merged: list[int] = []
    last = None
    for length, group in documents:
        if merged and group is not None and group == last:
            merged[-1] += length
        else:
            merged.append(length)
        last = group
    return merged


def _columns(rows: list[_Row]) -> dict[str, Tensor]:
    names = set(rows[0].columns)
    for row in rows:
        if set(row.columns) != names:
            raise ValueError(
                f"feature {row.number} has {sorted(row.columns)}, feature 0 has {sorted(names)}:"
                " give all features the same columns"
            )
    return {name: torch.cat([row.columns[name] for row in rows]) for name in sorted(names)}
