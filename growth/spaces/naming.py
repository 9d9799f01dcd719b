"""Names of tensors: in models with a head and without, in memory and in stock checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .table import Architecture


@dataclass(frozen=True)
class Place:
    """Where a stock tensor lies in memory.

    Args:
        name: of the parameter.
        expert, part, parts: of stacked experts: which one, and which part of its first axis.
    """

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of the parameter, or of what has its shape, that is the stock tensor."""
        if self.expert is None:
            return tensor
        return tensor[self.expert].chunk(self.parts)[self.part]


@dataclass(frozen=True)
class Naming:
    """How the tensors of one model are called.

    Args:
        table: of its family.
        whole_model: False: a model without a head, whose names leave out the table's root.
    """

    table: Architecture
    whole_model: bool

    @classmethod
    def of(cls, table: Architecture, names: Iterable[str]) -> Naming:
        """Return the naming that these names follow."""
        return cls(table, any(name.startswith(table.root) for name in names))

    def whole(self, name: str) -> str:
        """Return what a stock checkpoint of a whole model calls a tensor."""
        return self.table.stock_name(name if self.whole_model else self.table.root + name)

    def stored(self, whole: str) -> str:
        """Return what a stock checkpoint of this model calls a tensor of a whole model."""
        return whole if self.whole_model else whole.removeprefix(self.table.root)

    def wholes(self, name: str, shape: Sequence[int]) -> list[tuple[str, Place]]:
        """Return the stock tensors that a parameter in memory holds, and where."""
        whole = self.whole(name)
        layer, inner = self.table.split(whole)
        parts = self.table.stacked.get(inner, ())
        if layer is None or not parts:
            return [(whole, Place(name))]
        return [
            (self.table.join(layer, part.format(expert=expert)), Place(name, expert, i, len(parts)))
            for expert in range(shape[0])
            for i, part in enumerate(parts)
        ]

    def places(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Place]:
        """Return stock name -> place of all parameters with these names and shapes."""
        return dict(pair for name, shape in shapes.items() for pair in self.wholes(name, shape))

    @torch.no_grad()
    def build(self, name: str, shape: Sequence[int], make: Callable[[str], Tensor]) -> Tensor:
        """Return a parameter in memory, whose stock tensors `make` gives by their names."""
        wholes = self.wholes(name, shape)
        if wholes[0][1].expert is None:
            return make(wholes[0][0])
        built = None
        for whole, place in wholes:
            part = make(whole)
            if built is None:
                built = part.new_empty(tuple(shape))
            place.of(built).copy_(part)
        assert built is not None
        return built


def shape_at(place: Place, shape: Sequence[int]) -> torch.Size:
    """Return the shape of the stock tensor at a place in a parameter of this shape."""
    return place.of(torch.empty(tuple(shape), device="meta")).shape
