"""What is learned: a matrix per space, and a matrix of layers per name within a layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..maps import LinearMap, SpaceMap
from ..plan import GrowthPlan, LayerSource
from ..spaces import Architecture
from .start import deepens

# rotary positions turn pairs of dimensions of a head: mixing them would turn what is not a pair
_FIXED = ("qk_dim",)


class Learnable:
    """The linear map of a plan with weights that can be learned.

    What a space carries is the start's matrix plus a change B; what reads it changes by B as well,
    with the share that the start gives copies, so that reading is tied to writing as in the paper.
    A name's matrix (new layers, old layers) starts at the start's own terms.

    Args:
        plan: to start from.
        table: of the model's family.
        names: of the old tensors.
        noise: of the changes at first, normal, relative to a row of weight 1: without it, copies
            would have the same gradients and stay copies.
        seed: of the noise.
    """

    def __init__(
        self,
        plan: GrowthPlan,
        table: Architecture,
        names: Iterable[str],
        *,
        noise: float,
        seed: int,
    ) -> None:
        self._start, self._table, self._having = _placed(plan), table, _having(table, names)
        generator = torch.Generator("cpu").manual_seed(seed)
        self.changes = {
            space: _noise(found, noise, generator)
            for space, found in plan.spaces.items()
            if space not in _FIXED
        }
        self.depths = self._depths() if deepens(plan) else {}

    def parameters(self) -> list[Tensor]:
        """Return everything that is learned."""
        return [*self.changes.values(), *self.depths.values()]

    def plan(self) -> GrowthPlan:
        """Return the plan as it is now; its weights carry gradients."""
        spaces = {
            space: _mixed(found, self.changes[space]) if space in self.changes else found
            for space, found in self._start.spaces.items()
        }
        rows = {inner: matrix.unbind() for inner, matrix in self.depths.items()}
        layers = tuple(
            self._layer(layer, {inner: of[new] for inner, of in rows.items()}) if rows else layer
            for new, layer in enumerate(self._start.layers)
        )
        return replace(self._start, spaces=spaces, layers=layers)

    def _layer(self, start: LayerSource, rows: Mapping[str, Tensor]) -> LayerSource:
        first = start.terms[0][0]
        own = {}
        for inner, row in rows.items():
            weights = row.unbind()
            # the first one names the layer that also gives the kind of attention
            order = sorted(self._having[inner], key=lambda old: (old != first, old))
            if order[0] == first:
                own[inner] = tuple((old, weights[old]) for old in order)
        return LayerSource(start.terms, tuple(filter(self._is_norm, start.zero)), own)

    def _depths(self) -> dict[str, Tensor]:
        count, found = 1 + max(max(layers) for layers in self._having.values()), {}
        for inner in self._having:
            matrix = found[inner] = torch.zeros(len(self._start.layers), count)
            for new, layer in enumerate(self._start.layers):
                if inner not in layer.zero or self._is_norm(inner):
                    for old, weight in layer.own.get(inner, layer.terms):
                        matrix[new, old] += weight
            matrix.requires_grad_()
        return found

    def _is_norm(self, inner: str) -> bool:
        # a norm whose gain has an offset is not silent at a gain of 0
        return bool(self._table.weight(self._table.join(1, inner)).norm)


@torch.no_grad()
def settled(learnable: Learnable) -> GrowthPlan:
    """Return the plan as it is now, with numbers instead of weights that carry gradients."""
    plan = learnable.plan()
    spaces = {
        space: SpaceMap(LinearMap.dense(m.carries.matrix()), LinearMap.dense(m.reads.matrix()))
        for space, m in plan.spaces.items()
    }
    layers = tuple(
        replace(
            layer,
            own={
                inner: tuple((old, float(weight)) for old, weight in terms)
                for inner, terms in layer.own.items()
            },
        )
        for layer in plan.layers
    )
    return replace(plan, spaces=spaces, layers=layers)


def _having(table: Architecture, names: Iterable[str]) -> dict[str, list[int]]:
    """Return name within a layer -> the layers that have it."""
    found: dict[str, list[int]] = {}
    for layer, inner in map(table.split, names):
        if layer is not None:
            found.setdefault(inner, []).append(layer)
    return found


def _mixed(start: SpaceMap, change: Tensor) -> SpaceMap:
    carries, reads = start.carries.matrix(), start.reads.matrix()
    share = (carries * reads).sum(0) / (carries**2).sum(0)
    change = change.double()
    return SpaceMap(_all_entries(carries + change), _all_entries(reads + change * share))


def _all_entries(matrix: Tensor) -> LinearMap:
    # zeros too: their gradients are not zero
    new, old = matrix.shape
    row, column = (torch.arange(size, device=matrix.device) for size in matrix.shape)
    return LinearMap(new, old, row.repeat_interleave(old), column.repeat(new), matrix.flatten())


def _noise(space: SpaceMap, size: float, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(space.new, space.old, generator=generator, device="cpu")
    return (drawn * (size / math.sqrt(space.old))).to(torch.get_default_device()).requires_grad_()


def _placed(plan: GrowthPlan) -> GrowthPlan:
    # on the device that is the default now
    def moved(found: LinearMap) -> LinearMap:
        entries = (
            t.to(torch.get_default_device()) for t in (found.row, found.column, found.weight)
        )
        return LinearMap(found.new, found.old, *entries)

    return replace(
        plan, spaces={s: SpaceMap(moved(m.carries), moved(m.reads)) for s, m in plan.spaces.items()}
    )
