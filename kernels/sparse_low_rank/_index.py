"""A support as the kernels read it: sorted by rows and, for the input's gradient, by columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .support import Support


class RowIndex(NamedTuple):
    """Compressed rows and compressed columns; values lie in the order of the rows."""

    row_starts: Tensor  # (n + 1,) int32
    columns: Tensor  # (S,) int32
    column_starts: Tensor  # (m + 1,) int32
    rows: Tensor  # (S,) int32
    order: Tensor  # (S,) int32: which value each of `rows` has

    @classmethod
    def of(cls, flat: Tensor, out_features: int, in_features: int) -> RowIndex:
        """Return the index of ascending flat positions."""
        row, column = flat // in_features, flat % in_features
        order = column.argsort(stable=True)
        found = (_starts(row, out_features), column, _starts(column, in_features), row[order])
        return cls(*(part.int() for part in (*found, order)))

    def to(self, device: torch.device) -> RowIndex:
        """Return the index on a device; what goes by columns is read on the CPU alone."""
        rows, by_column = self[:2], self[2:]
        kept = by_column if device.type == "cpu" else [part[:0] for part in by_column]
        return RowIndex(*(part.to(device) for part in (*rows, *kept)))


class GroupIndex(NamedTuple):
    """Blocks by rows of blocks and by columns of blocks; the i-th block's values come i-th."""

    group_starts: Tensor  # (groups + 1,) int32: the blocks of each row of blocks
    chunks: Tensor  # (blocks,) int32: each block's column of blocks
    chunk_starts: Tensor  # (chunks + 1,) int32: into `groups` and `order`
    groups: Tensor  # (blocks,) int32: rows of blocks, sorted by column of blocks
    order: Tensor  # (blocks,) int32: which block each of `groups` is

    @classmethod
    def of(cls, hands: list[list[int]], groups: int, support: Support) -> GroupIndex:
        """Return the index of the columns of blocks that each row of blocks has."""
        # on the CPU, whatever the default device
        group = torch.tensor([g for g, hand in enumerate(hands) for _ in hand], device="cpu")
        chunk = torch.tensor([c for hand in hands for c in hand], device="cpu")
        order = chunk.argsort(stable=True)
        across = support.in_features // support.block[1]
        found = (_starts(group, groups), chunk, _starts(chunk, across), group[order], order)
        return cls(*(part.int() for part in found))

    def to(self, device: torch.device) -> GroupIndex:
        """Return the index on a device."""
        return GroupIndex(*(part.to(device) for part in self))


Index = RowIndex | GroupIndex


def positions(index: list[Tensor], layout: list[int], stored: int) -> Tensor:
    """Return the flat positions (S,) int64 of the values; what `Support.flat` says, from an index.

    Args:
        index: the five tensors of a RowIndex or GroupIndex.
        layout: 1 for blocks, else 0; rows and columns of the weight; rows and columns of a block.
        stored: S.
    """
    blocks, _, columns, *_ = layout
    if blocks:
        return _of_blocks(GroupIndex(*index), layout, stored)
    found = RowIndex(*index)
    return _owners(found.row_starts, stored) * columns + found.columns


def _of_blocks(index: GroupIndex, layout: list[int], stored: int) -> Tensor:
    _, rows, columns, height, width = layout
    count, device = len(index.chunks), index.chunks.device
    group = _owners(index.group_starts, count)
    corner = (group * height * columns + index.chunks * width)[:, None, None]
    across = torch.arange(width, device=device)[:, None]
    # the last rows of blocks are cut: their blocks come last, and as many as the sizes leave over
    last = rows - (len(index.group_starts) - 2) * height
    whole = count if last == height else (stored // width - count * last) // (height - last)
    parts = [
        (part + across + torch.arange(size, device=device) * columns).flatten()
        for part, size in ((corner[:whole], height), (corner[whole:], last))
    ]
    return torch.cat(parts)


def _owners(starts: Tensor, count: int) -> Tensor:
    counts = starts.diff().long()
    owner = torch.arange(len(counts), device=starts.device)
    # the size is known: a device need not be waited for
    return owner.repeat_interleave(counts, output_size=count)


def _starts(sorted_or_not: Tensor, size: int) -> Tensor:
    counts = torch.bincount(sorted_or_not, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
