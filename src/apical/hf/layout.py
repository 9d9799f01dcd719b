"""Which tokens of a batch form documents: worked out once per forward, not once per layer."""

import copy
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kernels.varlen_attention import PackedLayout


class Keys(NamedTuple):
    """The documents of one kind of layer, and which of its keys belong to them."""

    # what varlen_attention takes for boundaries: a layout, or tensors while a graph is traced
    documents: tuple[Any, ...]
    tokens: Tensor | None  # (T,) places of the real tokens among all keys; None: all are real
    columns: int  # keys per row that hold a token; a static cache is longer


class Padding(NamedTuple):
    """Where the tokens of one packed row lay in the batch that the model was called with."""

    tokens: Tensor  # (T,) places among all B * S
    batch: int
    length: int


class Layout:
    """The documents of B rows of S tokens, as every layer needs them.

    A layer may see other keys than its neighbour: sliding caches keep the newest, static ones have
    room for more. Keys of each kind are worked out once.
    """

    def __init__(
        self,
        bounds: Tensor,  # (N+1,) of the queries
        mask: Tensor | None,  # (B, past + S) bool
        *,
        rows: tuple[int, int],
        past: int,
        device: torch.device,
    ) -> None:
        self.batch, self.length = rows
        self.past = past
        self.device = device
        # of the batch before it was packed, if all layers run on one packed row
        self.padding: Padding | None = None
        self._bounds = bounds
        self._mask = mask
        self.tokens = None if mask is None else _places(mask[:, past:], device)
        self._keys: dict[int, Keys] = {}
        if not past:
            documents = _documents(bounds, None, device)
            self._keys[self.length] = Keys(documents, self.tokens, self.length)

    def keys(self, columns: int) -> Keys:
        """Return the documents of layers whose keys have so many columns per row."""
        if columns not in self._keys:
            self._keys[columns] = self._of(columns)
        return self._keys[columns]

    def _of(self, columns: int) -> Keys:
        total = self.past + self.length
        if not self.past and columns >= total:
            return self._keys[self.length]
        # a shorter cache keeps the newest keys, a longer one is filled from the front
        kept = min(columns, total)
        mask = None if self._mask is None else self._mask[:, total - kept :]
        bounds = _row_bounds(mask, batch=self.batch, length=kept, device=self._bounds.device)
        tokens = None if mask is None else _places(mask, self.device)
        return Keys(_documents(self._bounds, bounds, self.device), tokens, kept)

    @cached_property
    def has_holes(self) -> bool:
        """Whether padding lies between the tokens of a document."""
        if self._mask is None:
            return False
        total = self.past + self.length
        rows = _row_bounds(self._mask, batch=self.batch, length=total, device=self._mask.device)
        after_gap = (_places(self._mask, self._mask.device).diff() > 1).nonzero() + 1
        return not torch.isin(after_gap, rows if self.past else self._bounds).all()

    def with_queries(self, tokens: Tensor, real: Tensor) -> "Layout":
        """Return the layout in which these tokens alone attend, to all keys.

        For attention that looks both ways and has no window: queries are no longer aligned.

        Args:
            tokens: (R,) places among all B * S, ascending.
            real: (R,) their places among those that are not padding, on the CPU.
        """
        own = self._keys[self.length]
        bounds = torch.searchsorted(real, self._bounds.to(real), out_int32=True)
        part = copy.copy(self)
        part.tokens = tokens
        documents = _documents(bounds, self._bounds, self.device)
        part._keys = {self.length: own._replace(documents=documents)}
        return part

    def packed(self) -> "Layout":
        """Return the layout of the same documents side by side in one row, without the padding."""
        assert self.tokens is not None
        one = copy.copy(self)
        one.padding = Padding(self.tokens, self.batch, self.length)
        # asked while the mask is there
        one.has_holes = self.has_holes
        one.batch, one.length = 1, len(self.tokens)
        one.tokens = one._mask = None
        own = self._keys[self.length]
        one._keys = {one.length: own._replace(tokens=None, columns=one.length)}
        return one


def layout_of(arguments: Mapping[str, Any]) -> Layout:
    """Return the documents that a model's forward arguments describe.

    They come from ``cu_seq_lens_q`` if it is given, else from ``position_ids`` that restart and
    ``seq_idx`` that changes, else each row is one document; zeros of ``attention_mask`` belong to
    none.

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
        bounds = _given(arguments, mask=mask, past=past, tokens=batch * length)
    else:
        bounds = _found(arguments, mask=mask, past=past, batch=batch, length=length)
    return Layout(bounds, mask, rows=(batch, length), past=past, device=tokens.device)


def _on_host(x: Tensor) -> Tensor:
    # one copy instead of one wait for the device per question; a traced graph stays on its device
    return x if torch.compiler.is_compiling() else x.cpu()


def _documents(
    bounds_q: Tensor, bounds_k: Tensor | None, device: torch.device
) -> tuple[PackedLayout | Tensor, ...]:
    if torch.compiler.is_compiling():
        # reading boundaries would break the graph; the op reads them, once per batch
        return (bounds_q,) if bounds_k is None else (bounds_q, bounds_k)
    return (PackedLayout(bounds_q, bounds_k).to(device),)


def _places(mask: Tensor, device: torch.device) -> Tensor:
    return mask.flatten().nonzero().squeeze(1).to(device, non_blocking=True)


def _padding(mask: object, *, batch: int, length: int) -> Tensor | None:
    """Return the 2-D mask as booleans, or None where nothing is masked."""
    if isinstance(mask, dict):
        # generate prepares one mask per kind of layer for static caches; ours are all the same
        mask = next(iter(mask.values()))
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
    mask = _on_host(mask).bool()
    return None if mask.all() else mask


def _given(arguments: Mapping[str, Any], *, mask: Tensor | None, past: int, tokens: int) -> Tensor:
    if past:
        raise NotImplementedError("cu_seq_lens_q on top of a filled cache is not supported")
    if mask is not None:
        raise ValueError(
            "attention_mask has zeros although cu_seq_lens_q is given:"
            " drop the padding from the packed batch, or pass only one of the two"
        )
    bounds = _on_host(arguments["cu_seq_lens_q"])
    if torch.compiler.is_compiling():
        return bounds
    _check_bounds(bounds, tokens)
    of_keys = arguments.get("cu_seq_lens_k")
    if of_keys is not None and not torch.equal(of_keys.cpu(), bounds):
        raise ValueError(
            "cu_seq_lens_k differs from cu_seq_lens_q, but the keys are of the same tokens;"
            " leave it out"
        )
    index = arguments.get("seq_idx")
    if index is not None:
        changes = index.cpu().flatten().diff().nonzero().squeeze(1) + 1
        if set(changes.tolist()) != set(bounds.tolist()) - {0, tokens}:
            raise ValueError("seq_idx changes elsewhere than cu_seq_lens_q; pass only one of them")
    return bounds


def _check_bounds(bounds: Tensor, tokens: int) -> None:
    if bounds.ndim != 1 or bounds.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seq_lens_q is {bounds.dtype} of shape {tuple(bounds.shape)}, expected int32 (N+1,)"
        )
    ends = bounds.tolist()
    if not ends or ends[0] != 0 or ends[-1] != tokens or any(b < a for a, b in pairwise(ends)):
        raise ValueError(
            f"cu_seq_lens_q is {_short(ends)}, expected boundaries that begin with 0, do not"
            f" decrease and end with the {tokens} tokens of the batch"
        )


def _short(ends: list[int]) -> str:
    return str(ends) if len(ends) <= 8 else f"{str(ends[:4])[:-1]}, ..., {ends[-1]}]"


def _found(
    arguments: Mapping[str, Any], *, mask: Tensor | None, past: int, batch: int, length: int
) -> Tensor:
    """Return the bounds (N+1,) of the documents among the new tokens."""
    new = None if mask is None else mask[:, past:]
    tokens = arguments.get("input_ids")
    device = (arguments["inputs_embeds"] if tokens is None else tokens).device
    device = device if torch.compiler.is_compiling() else torch.device("cpu")
    rows = _row_bounds(new, batch=batch, length=length, device=device)
    position_ids, index = arguments.get("position_ids"), arguments.get("seq_idx")
    if position_ids is not None and position_ids.ndim != 2:
        raise NotImplementedError(
            f"position_ids of shape {tuple(position_ids.shape)} are not supported, only (batch,"
            " length); call use_kernels(model, attention=False)"
        )
    if (position_ids is None and index is None) or (past and length == 1):
        return rows
    given = [None if x is None else _on_host(x) for x in (position_ids, index)]
    documents = _document_bounds(given, new, batch=batch, length=length, device=device)
    if not past:
        return documents
    # a restart inside the new tokens would be a document that the cached keys leak into
    if len(documents) - 1 > int((rows.diff() > 0).sum()):
        raise NotImplementedError("packed rows on top of a filled cache are not supported")
    return rows


def _row_bounds(mask: Tensor | None, *, batch: int, length: int, device: torch.device) -> Tensor:
    """Return the bounds (B+1,) of documents that are the rows of a batch."""
    if mask is None:
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    return pad(mask.sum(1).cumsum(0), (1, 0)).int()


def _document_bounds(
    given: list[Tensor | None],
    mask: Tensor | None,
    *,
    batch: int,
    length: int,
    device: torch.device,
) -> Tensor:
    """Return the bounds (N+1,) of documents that begin where positions do not go on."""
    position_ids, index = given
    places = torch.arange(batch * length, device=device)
    tokens = places if mask is None else _places(mask, device)
    row, column = tokens // length, tokens % length
    begins = row.diff() != 0
    if position_ids is not None:
        step = position_ids.expand(batch, -1).flatten()[tokens].diff()
        # across padding inside a document, positions may count the padding or skip it
        begins |= (step != 1) & (step != column.diff())
    if index is not None:
        begins |= index.expand(batch, -1).flatten()[tokens].diff() != 0
    starts = torch.cat((row[:1] >= 0, begins)).nonzero().squeeze(1)
    return pad(starts, (0, 1), value=len(tokens)).int()
