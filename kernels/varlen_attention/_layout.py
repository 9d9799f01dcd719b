"""Which rows of a packed batch attend to which: checked once per batch, kept for every layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from ._tiles import Tiles, tiles_of

# boundaries of keys remembered with those of queries: none, an encoder's, and one more
_SIDES = 3


@dataclass(frozen=True)
class Document:
    """Rows of one document; ``queries`` begins with the first row that sees a key."""

    index: int
    queries: slice
    keys: slice


class PackedLayout:
    """The documents of a packed batch: what every layer needs to know, worked out once.

    Made from boundaries or lengths, and handed to `varlen_attention` in place of ``cu_seqlens_q``.
    A call with plain boundaries finds the layout that an earlier call made of the same tensors.

    Shapes: cu_seqlens_q, cu_seqlens_k (N + 1,) int32 or int64.

    Args:
        cu_seqlens_q: boundaries of the documents among the queries; starts at 0. Boundaries on a
            GPU are read once, here, which waits for the device.
        cu_seqlens_k: the same among keys and values; default: those of the queries.

    Raises:
        ValueError: boundaries do not start at 0, decrease, or bound different numbers of documents.

    Source: ours.
    """

    def __init__(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None) -> None:
        # copies: what is changed in place later is another layout, and a cache entry that held its
        # own key would never be dropped
        self.cu_seqlens_q = cu_seqlens_q.detach().clone()
        self.cu_seqlens_k = self.cu_seqlens_q
        if cu_seqlens_k is not None:
            self.cu_seqlens_k = cu_seqlens_k.detach().clone()
        self.bounds_q = _bounds(cu_seqlens_q, "cu_seqlens_q")
        shared = cu_seqlens_k is None
        self.bounds_k = self.bounds_q if shared else _bounds(self.cu_seqlens_k, "cu_seqlens_k")
        if len(self.bounds_q) != len(self.bounds_k):
            raise ValueError(
                f"cu_seqlens_k has N+1={len(self.bounds_k)}, cu_seqlens_q has"
                f" N+1={len(self.bounds_q)}; both must bound the same documents"
            )
        self._documents: dict[int, list[Document]] = {}
        self._tables: dict[int, Tensor] = {}
        self._moved: dict[torch.device, PackedLayout] = {}
        self._tiles: dict[tuple[str, torch.device, bool], list[Tiles]] = {}
        _remember(self)

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        lengths_k: Sequence[int] | None = None,
        *,
        groups: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> "PackedLayout":
        """Return the layout of documents of these lengths, without waiting for a device.

        Args:
            lengths: query tokens of each document.
            lengths_k: key tokens of each; default: the same.
            groups: a number per document: neighbours with the same number become one document and
                see each other (in-context pre-training: Shi et al. 2023, arXiv:2310.10638).
            device: where the boundaries are put.

        Raises:
            ValueError: a length is negative, or the lists have different lengths.
        """
        both = [list(lengths), list(lengths if lengths_k is None else lengths_k)]
        of_document = list(range(len(lengths)) if groups is None else groups)
        if not len(both[0]) == len(both[1]) == len(of_document):
            raise ValueError(
                f"lengths has {len(both[0])} entries, lengths_k {len(both[1])} and groups"
                f" {len(of_document)}; give one entry per document in each"
            )
        if min(both[0] + both[1], default=0) < 0:
            raise ValueError("lengths and lengths_k must not be negative; 0 is an empty document")
        inner = {n for n, (one, next_) in enumerate(pairwise(of_document), 1) if one == next_}
        bounds = [
            torch.tensor([end for n, end in enumerate([0, *accumulate(x)]) if n not in inner])
            for x in both
        ]
        layout = cls(bounds[0].int(), None if lengths_k is None else bounds[1].int())
        return layout.to(device)

    def to(self, device: torch.device | str) -> "PackedLayout":
        """Return the same layout with its boundaries on a device, copied there once."""
        device = torch.device(device)
        if device == self.cu_seqlens_q.device == self.cu_seqlens_k.device:
            return self
        if device not in self._moved:
            self._moved[device] = self._copied(device)
        return self._moved[device]

    def _copied(self, device: torch.device) -> "PackedLayout":
        moved = object.__new__(type(self))
        vars(moved).update(vars(self))
        moved.cu_seqlens_q = self.cu_seqlens_q.to(device, non_blocking=True)
        shared = self.cu_seqlens_k is self.cu_seqlens_q
        moved.cu_seqlens_k = (
            moved.cu_seqlens_q if shared else self.cu_seqlens_k.to(device, non_blocking=True)
        )
        moved._moved = {}
        _remember(moved)
        return moved

    @property
    def max_seqlen_q(self) -> int:
        """Queries of the longest document."""
        return max((end - start for start, end in pairwise(self.bounds_q)), default=0)

    @property
    def max_seqlen_k(self) -> int:
        """Keys of the longest document."""
        return max((end - start for start, end in pairwise(self.bounds_k)), default=0)

    def boundaries(self) -> tuple[Tensor, Tensor | None]:
        """Return the boundaries of queries, and those of keys if they are other ones."""
        shared = self.cu_seqlens_k is self.cu_seqlens_q
        return self.cu_seqlens_q, None if shared else self.cu_seqlens_k

    def documents(self, right: int) -> list[Document]:
        """Return the documents in which a query sees a key, in order.

        Rows outside all of them are those whose result and gradient are 0: rows that see no key,
        and tokens after the last boundary.

        Args:
            right: how many keys to the right of its place a query sees; 0 is causal.
        """
        if right not in self._documents:
            spans = zip(pairwise(self.bounds_q), pairwise(self.bounds_k), strict=True)
            # aligned at the bottom right: row i sees keys up to i + J - I + right
            cut = [
                Document(n, slice(max(q, q_end - (k_end - k) - right), q_end), slice(k, k_end))
                for n, ((q, q_end), (k, k_end)) in enumerate(spans)
                if k < k_end
            ]
            self._documents[right] = [one for one in cut if one.queries.start < one.queries.stop]
        return self._documents[right]

    def table(self, right: int) -> Tensor:
        """Return the documents as rows of numbers for C++: queries, keys, index; (N', 5) int64."""
        if right not in self._tables:
            rows = [
                (d.queries.start, d.queries.stop, d.keys.start, d.keys.stop, d.index)
                for d in self.documents(right)
            ]
            self._tables[right] = torch.tensor(rows, dtype=torch.int64).view(-1, 5)
        return self._tables[right]

    def tiles(self, side: str, device: torch.device, causal: bool) -> list[Tiles]:
        """Return the work of a GPU kernel that walks over queries ("q") or keys ("k")."""
        key = side, device, causal
        if key not in self._tiles:
            found = tiles_of(self.bounds_q, self.bounds_k, side=side, causal=causal)
            self._tiles[key] = [
                Tiles(tiles.where.to(device, non_blocking=True), tiles.rows) for tiles in found
            ]
        return self._tiles[key]


def layout_of(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, *, tokens_q: int, tokens_k: int
) -> PackedLayout:
    """Return the layout of these boundaries: the one they came from, the cached one, or a new one.

    Raises:
        ValueError: as `PackedLayout`, or the boundaries end after the last token.
    """
    layout = _cached(cu_seqlens_q, cu_seqlens_k)
    name_k = "cu_seqlens_k" if cu_seqlens_k is not None else "cu_seqlens_q, which bounds k too,"
    ends = (("cu_seqlens_q", layout.bounds_q, tokens_q), (name_k, layout.bounds_k, tokens_k))
    for name, bounds, tokens in ends:
        if bounds[-1] > tokens:
            raise ValueError(
                f"{name} ends at {bounds[-1]}, but there are {tokens} tokens;"
                " it must end at or before"
            )
    return layout


class _Entry(NamedTuple):
    of_k: Callable[[], Tensor | None]  # the boundaries of keys, while they live
    versions: tuple[int | None, ...]
    layout: PackedLayout


# layouts by the identity of boundaries of queries: with boundaries of keys or without (a decoder's
# attention to itself, and to an encoder)
_SEEN: "WeakIdKeyDictionary" = WeakIdKeyDictionary()


def _remember(layout: PackedLayout) -> None:
    """Make a layout found by its own boundaries, which autograd keeps longer than the layout."""
    twin = object.__new__(PackedLayout)
    vars(twin).update(vars(layout))
    # an entry that held its own key would never be dropped
    own_q, own_k = layout.boundaries()
    twin.cu_seqlens_q = own_q.detach()
    twin.cu_seqlens_k = twin.cu_seqlens_q if own_k is None else own_k.detach()
    _keep(own_q, own_k, twin)


def _cached(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> PackedLayout:
    versions = _versions(cu_seqlens_q, cu_seqlens_k)
    known: list[_Entry] = _SEEN.get(cu_seqlens_q) or []
    for entry in known:
        if entry.versions == versions and entry.of_k() is cu_seqlens_k:
            return entry.layout
    layout = PackedLayout(cu_seqlens_q, cu_seqlens_k)
    # what is changed in place under inference_mode leaves no trace
    if None not in versions:
        _keep(cu_seqlens_q, cu_seqlens_k, layout)
    return layout


def _keep(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, layout: PackedLayout) -> None:
    known: list[_Entry] = _SEEN.get(cu_seqlens_q) or []
    of_k = (lambda: None) if cu_seqlens_k is None else WeakIdRef(cu_seqlens_k)
    entry = _Entry(of_k, _versions(cu_seqlens_q, cu_seqlens_k), layout)
    _SEEN[cu_seqlens_q] = [entry, *known[: _SIDES - 1]]


def _versions(*boundaries: Tensor | None) -> tuple[int | None, ...]:
    # two or one: boundaries of keys that are gone are not taken for none at all
    given = (x for x in boundaries if x is not None)
    return tuple(None if x.is_inference() else x._version for x in given)


def _bounds(cu_seqlens: Tensor, name: str) -> list[int]:
    bounds: list[int] = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0:
        raise ValueError(f"{name} must start with 0, got {bounds[:1]}; prepend the 0")
    for i, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(
                f"{name} must not decrease, got {start} then {end} at document {i}; "
                "pass the cumulative sum of the lengths"
            )
    return bounds
