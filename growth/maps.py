"""Linear maps of spaces: how new directions are made of old ones, and how they are read."""

from __future__ import annotations

import base64
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A matrix (new, old) by its entries: new direction `row` has `weight` of old `column`.

    Args:
        new, old: how many directions there are.
        row, column: (E,) int64, sorted by row.
        weight: (E,) float64.
    """

    new: int
    old: int
    row: Tensor
    column: Tensor
    weight: Tensor

    @classmethod
    def of(
        cls, old: int, sources: Sequence[int], weights: Sequence[float] | float = 1.0
    ) -> LinearMap:
        """Return the map whose new direction i is `weights[i]` times old `sources[i]` (-1: 0)."""
        source = torch.tensor(sources, dtype=torch.int64)
        weight = torch.as_tensor(weights, dtype=torch.float64).expand(len(source))
        kept = source >= 0
        row = torch.arange(len(source))[kept]
        return cls(len(source), old, row, source[kept], weight[kept].clone())

    @classmethod
    def identity(cls, size: int) -> LinearMap:
        """Return the map that changes nothing."""
        return cls.of(size, range(size))

    @classmethod
    def dense(cls, matrix: Tensor) -> LinearMap:
        """Return the map of a matrix (new, old), without its zeros."""
        matrix = matrix.detach().to("cpu", torch.float64)
        row, column = matrix.nonzero().T
        new, old = matrix.shape
        return cls(new, old, row, column, matrix[row, column])

    @property
    def selects(self) -> bool:
        """Whether every new direction is at most one old one, times a weight."""
        return bool((self.row[1:] > self.row[:-1]).all())

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        same = torch.equal(self.row, self.column) and bool((self.weight == 1).all())
        return same and self.new == self.old == len(self.row)

    def matrix(self) -> Tensor:
        """Return the matrix (new, old), float64."""
        full = self.weight.new_zeros(self.new, self.old)
        return full.index_put_((self.row, self.column), self.weight, accumulate=True)

    @functools.cached_property
    def _full(self) -> Tensor:
        # a map that does not select is applied to many tensors; its entries take more memory
        return self.matrix()

    def at(self, row: Tensor, column: Tensor) -> Tensor:
        """Return the entries of the matrix at these places, (E,)."""
        if not self.selects:
            return self.matrix()[row, column]
        weight = torch.zeros(self.new, dtype=torch.float64)
        weight[self.row] = self.weight
        return torch.where(self.sources()[row] == column, weight[row], 0.0)

    def sources(self) -> Tensor:
        """Return the old direction of every new one, (new,) int64; -1: none. It must select."""
        found = torch.full((self.new,), -1)
        found[self.row] = self.column
        return found

    def scaled(self, weight: Tensor | float) -> LinearMap:
        """Return the map with entries times a weight, (new,) or one for all."""
        factor = torch.as_tensor(weight, dtype=torch.float64).expand(self.new)[self.row]
        return LinearMap(self.new, self.old, self.row, self.column, self.weight * factor)

    def power(self, exponent: int) -> LinearMap:
        """Return the map of the weights' powers."""
        return LinearMap(self.new, self.old, self.row, self.column, self.weight**exponent)

    def transposed(self) -> LinearMap:
        """Return the map of the transposed matrix."""
        order = (self.column * self.new + self.row).argsort()
        entries = (t[order] for t in (self.column, self.row, self.weight))
        return LinearMap(self.old, self.new, *entries)

    def after(self, first: LinearMap) -> LinearMap:
        """Return the map that applies `first`, then this one."""
        if self.selects and first.selects:
            source, weight = first.sources(), torch.zeros(first.new, dtype=torch.float64)
            weight[first.row] = first.weight
            kept = source[self.column] >= 0
            column = self.column[kept]
            return LinearMap(
                self.new, first.old, self.row[kept], source[column],
                self.weight[kept] * weight[column],
            )  # fmt: skip
        if 8 * len(self.row) < self.new * self.old and 8 * len(first.row) < first.new * first.old:
            # dense matrices of thousands of directions take gigabytes and minutes
            return self._after_sparse(first)
        return LinearMap.dense(self.matrix() @ first.matrix())

    def _after_sparse(self, first: LinearMap) -> LinearMap:
        # every entry of ours meets those of one row of the first, which lie side by side
        lengths = torch.bincount(first.row, minlength=first.new)
        starts, count = lengths.cumsum(0) - lengths, lengths[self.column]
        within = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
        met = starts[self.column].repeat_interleave(count) + within
        place = self.row.repeat_interleave(count) * first.old + first.column[met]
        place, where = place.unique(return_inverse=True)
        weight = torch.zeros(len(place), dtype=torch.float64)
        weight.index_add_(0, where, self.weight.repeat_interleave(count) * first.weight[met])
        place, weight = place[weight != 0], weight[weight != 0]
        return LinearMap(self.new, first.old, place // first.old, place % first.old, weight)

    def times(self, inner: LinearMap) -> LinearMap:
        """Return the Kronecker product: this map of slower directions, `inner` of faster ones."""

        def pairs(slow: Tensor, fast: Tensor, size: int) -> Tensor:
            return (slow[:, None] * size + fast).flatten()

        row = pairs(self.row, inner.row, inner.new)
        column = pairs(self.column, inner.column, inner.old)
        weight = (self.weight[:, None] * inner.weight).flatten()
        order = row.argsort(stable=True)
        return LinearMap(self.new * inner.new, self.old * inner.old,
                         row[order], column[order], weight[order])  # fmt: skip

    def apply(self, tensor: Tensor, axis: int) -> Tensor:
        """Return the tensor with this axis mapped; a selection with weight 1 is bit for bit."""
        if self.is_identity:
            return tensor
        if tensor.shape[axis] != self.old:
            raise ValueError(
                f"axis {axis} of a tensor of shape {tuple(tensor.shape)} has not {self.old} entries"
            )
        wide = torch.promote_types(tensor.dtype, torch.float32)
        shape = [-1 if i == axis else 1 for i in range(tensor.ndim)]
        row, column = self.row.to(tensor.device), self.column.to(tensor.device)
        weight = self.weight.to(tensor.device, wide).view(shape)
        if not self.selects:
            matrix = self._full.to(tensor.device, wide)
            moved = tensor.to(wide).movedim(axis, 0)
            return torch.tensordot(matrix, moved, dims=1).movedim(0, axis).to(tensor.dtype)
        found = tensor.index_select(axis, column)
        if bool((self.weight != 1).any()):
            found = found.to(wide).mul_(weight).to(tensor.dtype)
        if len(row) == self.new:
            return found
        size = [self.new if i == axis else n for i, n in enumerate(tensor.shape)]
        return tensor.new_zeros(size).index_copy_(axis, row, found)

    def to_dict(self) -> dict[str, Any]:
        """Return sizes, and runs [row, column, count, weight] of entries that count up together.

        Where most entries of a matrix are there, it is written as the bytes of its float64 instead.
        """
        if 2 * len(self.row) > self.new * self.old and not self.selects:
            data = base64.b64encode(self.matrix().numpy().astype("<f8").tobytes())
            return {"new": self.new, "old": self.old, "float64": data.decode("ascii")}
        breaks = (
            (self.row.diff() != 1) | (self.column.diff() != 1) | (self.weight.diff() != 0)
        ).nonzero()[:, 0] + 1
        edges = [0, *breaks.tolist(), len(self.row)]
        runs = [
            [int(self.row[a]), int(self.column[a]), b - a, float(self.weight[a])]
            for a, b in itertools.pairwise(edges)
            if b > a
        ]
        return {"new": self.new, "old": self.old, "runs": runs}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LinearMap:
        """Return the map that `to_dict` wrote."""
        if "float64" in data:
            values = np.frombuffer(base64.b64decode(data["float64"]), "<f8").astype(np.float64)
            return cls.dense(torch.from_numpy(values).view(data["new"], data["old"]))
        runs = data["runs"]
        counts = torch.tensor([run[2] for run in runs], dtype=torch.int64)
        step = torch.cat([torch.arange(n) for n in counts.tolist()]) if runs else counts

        def spread(index: int, dtype: torch.dtype) -> Tensor:
            return torch.tensor([run[index] for run in runs], dtype=dtype).repeat_interleave(counts)

        row, column = (spread(i, torch.int64) + step for i in (0, 1))
        return cls(data["new"], data["old"], row, column, spread(3, torch.float64))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LinearMap) or (self.new, self.old) != (other.new, other.old):
            return False
        pairs = zip(self._entries(), other._entries(), strict=True)
        return all(torch.equal(mine, theirs) for mine, theirs in pairs)

    def __hash__(self) -> int:
        return hash((self.new, self.old, len(self.row)))

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.row, self.column, self.weight


def joined(maps: Iterable[LinearMap]) -> LinearMap:
    """Return the map of spaces that lie one after the other on an axis."""
    maps = list(maps)
    new = [sum(m.new for m in maps[:i]) for i in range(len(maps))]
    old = [sum(m.old for m in maps[:i]) for i in range(len(maps))]
    return LinearMap(
        sum(m.new for m in maps),
        sum(m.old for m in maps),
        torch.cat([m.row + at for m, at in zip(maps, new, strict=True)]),
        torch.cat([m.column + at for m, at in zip(maps, old, strict=True)]),
        torch.cat([m.weight for m in maps]),
    )


@dataclass(frozen=True)
class SpaceMap:
    """How a space grows: what new directions carry, and with which weight they are read.

    With activations x of the space, a weight that writes them gets the rows `carries @ W`, one that
    reads them the columns `W @ reads.T`; the function is kept where `reads.T @ carries` is 1.

    Args:
        carries, reads: matrices (new, old).
        ahead: (new,) bool; these directions are those of the next layer (advanced knowledge).
        amplitude: (old,) before a norm: by how much more is carried than behind it.
    """

    carries: LinearMap
    reads: LinearMap
    ahead: Tensor | None = field(default=None, compare=False)
    amplitude: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if (self.carries.new, self.carries.old) != (self.reads.new, self.reads.old):
            raise ValueError(
                f"carries is ({self.carries.new}, {self.carries.old}) and reads ({self.reads.new}, "
                f"{self.reads.old}); expected one shape"
            )

    @property
    def new(self) -> int:
        return self.carries.new

    @property
    def old(self) -> int:
        return self.carries.old

    def inverse(self) -> SpaceMap:
        """Return the map back: it undoes this one where this one keeps the function."""
        return SpaceMap(self.reads.transposed(), self.carries.transposed())

    def to_dict(self) -> dict[str, Any]:
        """Return the maps as lists, dicts and scalars."""
        ahead = None if self.ahead is None else self.ahead.nonzero()[:, 0].tolist()
        return {"carries": self.carries.to_dict(), "reads": self.reads.to_dict(), "ahead": ahead}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SpaceMap:
        """Return the map that `to_dict` wrote."""
        carries, reads = (LinearMap.from_dict(data[name]) for name in ("carries", "reads"))
        ahead = None
        if data["ahead"] is not None:
            ahead = torch.zeros(carries.new, dtype=torch.bool)
            ahead[data["ahead"]] = True
        return cls(carries, reads, ahead)

    def after(self, first: SpaceMap) -> SpaceMap:
        """Return the map that does `first`, then this one."""
        return SpaceMap(self.carries.after(first.carries), self.reads.after(first.reads))

    def error(self) -> float:
        """Return the largest entry of reads.T @ carries - 1: 0 keeps what is read."""
        product = self.reads.transposed().after(self.carries)
        on = product.row == product.column
        diagonal = torch.zeros(self.old, dtype=torch.float64)
        diagonal[product.row[on]] = product.weight[on]
        rest = product.weight[~on].abs()
        return float(torch.cat([(diagonal - 1).abs(), rest]).max())
