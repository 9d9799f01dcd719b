"""Which tokens of a batch form documents: worked out once per forward, not once per layer."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Layout(NamedTuple):
    """The documents of a batch of B rows of S tokens, as every layer needs them."""

    cu_seqlens_q: Tensor  # (N+1,) int32
    cu_seqlens_k: Tensor  # (N+1,) int32
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    tokens_q: Tensor | None  # (T,) places of the real tokens among all B * S; None: all are real
    tokens_k: Tensor | None  # (T,) the same among the keys
    key_length: int  # keys per row that hold a token; a static cache is longer


def layout_of(arguments: Mapping[str, Any]) -> Layout:
    """Return the documents that a model's forward arguments describe.

    They come from ``cu_seq_lens_q`` if it is given, else from ``position_ids`` that restart, else
    each row is one document; zeros of ``attention_mask`` belong to none.

    Raises:
        NotImplementedError: a prepared (4-D) mask, or packed rows on top of a filled cache.
        ValueError: the arguments contradict each other.
    """
    tokens = arguments.get("input_ids")
    tokens = arguments["inputs_embeds"] if tokens is None else tokens
    batch, length = tokens.shape[:2]
    cache = arguments.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    mask = _padding(arguments.get("attention_mask"), batch=batch, length=past + length)
    if arguments.get("cu_seq_lens_q") is not None:
        return _given(arguments, mask=mask, past=past, length=length)
    position_ids = arguments.get("position_ids")
    if position_ids is not None and position_ids.ndim != 2:
        raise NotImplementedError(
            f"position_ids of shape {tuple(position_ids.shape)} are not supported, only (batch,"
            " length); call use_kernels(model, attention=False)"
        )
    if past == 0:
        return _without_cache(mask, position_ids, batch=batch, length=length, device=tokens.device)
    return _with_cache(
        mask, position_ids, batch=batch, length=length, past=past, device=tokens.device
    )


def _padding(mask: object, *, batch: int, length: int) -> Tensor | None:
    """Return the 2-D mask as booleans, or None where nothing is masked."""
    if isinstance(mask, dict):
        # generate prepares one mask per kind of layer for static caches; all layers are of this one
        mask = mask["full_attention"]
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise NotImplementedError(
            "apical's attention takes a 2-D attention_mask (batch, length) only;"
            " for prepared masks call use_kernels(model, attention=False)"
        )
    if mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, {length}):"
            " one entry per token, those in the cache included"
        )
    mask = mask.bool()
    return None if mask.all() else mask


def _given(arguments: Mapping[str, Any], *, mask: Tensor | None, past: int, length: int) -> Layout:
    if past:
        raise NotImplementedError("cu_seq_lens_q on top of a filled cache is not supported")
    if mask is not None:
        raise ValueError(
            "attention_mask has zeros although cu_seq_lens_q is given:"
            " drop the padding from the packed batch, or pass only one of the two"
        )
    bounds_q = arguments["cu_seq_lens_q"]
    bounds_k = arguments.get("cu_seq_lens_k")
    bounds_k = bounds_q if bounds_k is None else bounds_k
    longest_q, longest_k = arguments.get("max_length_q"), arguments.get("max_length_k")
    return Layout(bounds_q, bounds_k, longest_q, longest_k, None, None, length)


def _without_cache(
    mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    batch: int,
    length: int,
    device: torch.device,
) -> Layout:
    tokens = None if mask is None else mask.flatten().nonzero().squeeze(1)
    if position_ids is None:
        bounds = _row_bounds(mask, batch=batch, length=length, device=device)
    else:
        bounds = _document_bounds(position_ids, tokens, batch=batch, length=length)
    return Layout(bounds, bounds, None, None, tokens, tokens, length)


def _with_cache(
    mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    batch: int,
    length: int,
    past: int,
    device: torch.device,
) -> Layout:
    keys = past + length
    new = None if mask is None else mask[:, -length:]
    tokens_q = None if new is None else new.flatten().nonzero().squeeze(1)
    tokens_k = None if mask is None else mask.flatten().nonzero().squeeze(1)
    bounds_q = _row_bounds(new, batch=batch, length=length, device=device)
    bounds_k = _row_bounds(mask, batch=batch, length=keys, device=device)
    if position_ids is not None and length > 1:
        documents = _document_bounds(position_ids, tokens_q, batch=batch, length=length)
        # a restart inside the new tokens would be a document that the cached keys leak into
        if len(documents) - 1 > int((bounds_q.diff() > 0).sum()):
            raise NotImplementedError("packed rows on top of a filled cache are not supported")
    return Layout(bounds_q, bounds_k, None, None, tokens_q, tokens_k, keys)


def _row_bounds(mask: Tensor | None, *, batch: int, length: int, device: torch.device) -> Tensor:
    """Return the bounds (B+1,) of documents that are the rows of a batch."""
    if mask is None:
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    return pad(mask.sum(1).cumsum(0), (1, 0)).int()


def _document_bounds(
    position_ids: Tensor, tokens: Tensor | None, *, batch: int, length: int
) -> Tensor:
    """Return the bounds (N+1,) of documents that begin where positions do not go on."""
    if tokens is None:
        tokens = torch.arange(batch * length, device=position_ids.device)
    row, column = tokens // length, tokens % length
    position = position_ids.expand(batch, -1).flatten()[tokens]
    step = position.diff()
    # across padding inside a document, positions may count the padding or skip it
    begins = (row.diff() != 0) | ((step != 1) & (step != column.diff()))
    starts = torch.cat((row[:1] >= 0, begins)).nonzero().squeeze(1)
    return pad(starts, (0, 1), value=len(tokens)).int()
