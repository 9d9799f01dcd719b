"""Which entries of a weight are stored: a function of a seed, so that no checkpoint holds it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from . import _patterns as patterns
from ._index import GroupIndex, Index, RowIndex

Kind = Literal["uniform", "regular", "grouped", "nm", "explicit"]
KINDS = ("uniform", "regular", "grouped", "nm")


@dataclass(frozen=True, eq=False)
class Support:
    """The stored entries of a weight of shape (out_features, in_features), in a fixed order.

    Kinds:
        uniform: ``int(density x out x in)`` entries, any with equal chance (SLTrain's).
        regular: the same number in every row, and in every column up to one.
        grouped: blocks of ``block`` = (rows, columns), each row of blocks with its own columns of
            blocks; blocks at the lower edge are cut, columns after the last whole block stay empty.
        nm: n of every m entries of a row, ``block`` = (n, m); density is n / m.
        explicit: positions from elsewhere, see ``Support.explicit``.

    The positions depend on the kind, the shape, the density, the block and the seed alone: integer
    arithmetic, bit-identical on every device and rank.

    Raises:
        ValueError: unknown kind, density not in 0 .. 1 or too small to hold one entry, a block that
            does not fit.

    Source: uniform, Han et al. 2024 (SLTrain, arXiv 2406.02214); the others ours.
    """

    kind: Kind
    out_features: int
    in_features: int
    density: float
    seed: int = 0
    block: tuple[int, int] = (0, 0)  # by default 128 x 16, and 2 of 4
    positions: Tensor | None = field(default=None, repr=False)
    stored: int = field(init=False, repr=False)  # how many entries are
    _cache: dict[torch.device, Index] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.block == (0, 0):
            object.__setattr__(self, "block", (2, 4) if self.kind == "nm" else (128, 16))
        patterns.check(self)
        object.__setattr__(self, "stored", patterns.count(self))

    @classmethod
    def explicit(cls, positions: Tensor, out_features: int, in_features: int) -> Support:
        """Return the support of these flat positions, row times in_features plus column.

        Shapes: positions (S,) int32 or int64, distinct, in any order; values belong to them in
        ascending order.
        """
        flat = patterns.checked_positions(positions, out_features, in_features)
        density = len(flat) / (out_features * in_features)
        return cls("explicit", out_features, in_features, density, positions=flat)

    def flat(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the flat positions (S,) int64 of the values, in the order of the values."""
        return patterns.flat(self, torch.device(device))

    def index(self, device: torch.device | str) -> Index:
        """Return what the kernels read, on that device; made once."""
        device = torch.device(device)
        self._make_index(device)
        return self._cache[device]

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the entries as a mask (out_features, in_features) bool."""
        mask = torch.zeros(self.out_features * self.in_features, dtype=torch.bool, device=device)
        mask[self.flat(device)] = True
        return mask.view(self.out_features, self.in_features)

    # a compiled function does this when it is traced, and then reads the index from here
    @torch.compiler.assume_constant_result
    def _make_index(self, device: torch.device) -> bool:
        if device in self._cache:
            return True
        # what is made under inference_mode could not be kept for a backward pass later
        with torch.inference_mode(False):
            if self.kind == "grouped":
                groups = math.ceil(self.out_features / self.block[0])
                index = GroupIndex.of(patterns.blocks(self), groups, self)
            else:
                index = RowIndex.of(self.flat(), self.out_features, self.in_features)
            self._cache[device] = index.to(device)
        return True

    def __getstate__(self) -> dict[str, Any]:
        # a pickle or a copy makes its index again
        return self.__dict__ | {"_cache": {}}
