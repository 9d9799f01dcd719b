"""How plans are printed, and how two are compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from .maps import LinearMap, SpaceMap
from .plan import GrowthPlan, LayerSource

_MAX_ROWS = 12  # of the printed layers
_PLAIN = ("operator", "options", "model_type", "config", "fill", "preserves_function")


def table(plan: GrowthPlan) -> str:
    """Return a plan as a table: its layers, its spaces, and why the function changes."""
    options = ", ".join(f"{k}={_short(v)}" for k, v in plan.options.items() if v is not None)
    used = len({old for layer in plan.layers for old, _ in layer.terms})
    kept = "is preserved" if plan.preserves_function else "changes"
    title = (
        f"{plan.operator}({options}): {plan.model_type}, {len(plan.layers)} layers from {used}; "
        f"the function {kept}"
    )
    return "\n".join([title, *_layer_lines(plan), *_space_lines(plan), *_notes(plan)])


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _layer_lines(plan: GrowthPlan) -> list[str]:
    rows = [_row(first, last, plan.layers) for first, last in _runs(plan.layers)]
    if len(rows) > _MAX_ROWS:
        rows[_MAX_ROWS - 2 : -1] = [("…", f"{len(rows) - _MAX_ROWS + 1} more", "")]
    lines = [f"{new:>9}  {old:<11}  {zero}".rstrip() for new, old, zero in rows]
    return ["new layer  old layer    set to zero", *lines]


def _space_lines(plan: GrowthPlan) -> list[str]:
    lines = [f"{space:>9}  {m.old} -> {m.new:<6}  {_how(m)}" for space, m in plan.spaces.items()]
    return ["    space  size", *lines] if lines else []


def _how(space: SpaceMap) -> str:
    """Return in words how the directions of a space are made and read."""
    if not space.carries.selects:
        return f"sums of {_most(space.carries.row)}, {_weights(space.carries)}"
    sources = space.carries.sources()
    counts = torch.bincount(space.carries.column, minlength=space.old)
    parts = []
    least, most = int(counts.min()), int(counts.max())
    if most > 1:
        parts.append(f"{most} copies" if least == most else f"{least} to {most} copies")
        parts.append(f"read {_weights(space.reads)}")
    if empty := int((sources < 0).sum()):
        parts.append(f"{empty} carry nothing")
    if dropped := int((counts == 0).sum()):
        parts.append(f"{dropped} dropped")
    if space.ahead is not None:
        parts.append(f"{int(space.ahead.sum())} from the next layer")
    return ", ".join(parts) or "in another order"


def _most(index: torch.Tensor) -> int:
    return int(torch.bincount(index).max())


def _weights(found: LinearMap) -> str:
    values = sorted({round(weight, 4) for weight in found.weight.tolist()})
    return f"× {values[0]:g}" if len(values) == 1 else f"× {values[0]:g} to {values[-1]:g}"


def _notes(plan: GrowthPlan) -> list[str]:
    return [f"note: {note}" for note in plan.notes]


def differences(one: GrowthPlan, other: GrowthPlan) -> Iterator[str]:
    """Yield what differs between two plans, a line each."""
    for name in _PLAIN:
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs:
            yield f"{name}: {mine} -> {theirs}"
    if one.notes != other.notes:
        yield f"notes: {'; '.join(one.notes)} -> {'; '.join(other.notes)}"
    for at, (mine, theirs) in enumerate(itertools.zip_longest(one.layers, other.layers)):
        if mine != theirs:
            yield f"layer {at}: {_said(mine)} -> {_said(theirs)}"
    for space in {**one.spaces, **other.spaces}:
        mine, theirs = one.spaces.get(space), other.spaces.get(space)
        if mine != theirs or not _same_ahead(mine, theirs):
            yield f"{space}: {_sized(mine)} -> {_sized(theirs)}"


def _same_ahead(mine: SpaceMap | None, theirs: SpaceMap | None) -> bool:
    ahead = [None if m is None or m.ahead is None else m.ahead.tolist() for m in (mine, theirs)]
    return ahead[0] == ahead[1]


def _sized(space: SpaceMap | None) -> str:
    return "as it is" if space is None else f"{space.new} of {space.old} ({_how(space)})"


def _said(layer: LayerSource | None) -> str:
    if layer is None:
        return "none"
    _, old, zero = _row(0, 0, (layer,))
    return f"{old} ({zero})" if zero else old


def _runs(layers: tuple[LayerSource, ...]) -> list[tuple[int, int]]:
    """Return (first, last) of the runs of new layers whose old layers count up one by one."""
    starts = [new for new in range(1, len(layers)) if not _follows(layers[new], layers[new - 1])]
    return [
        (first, after - 1)
        for first, after in zip([0, *starts], [*starts, len(layers)], strict=True)
    ]


def _follows(layer: LayerSource, before: LayerSource) -> bool:
    if layer.random or before.random:
        return layer.random and before.random
    counted_up = tuple((old + 1, weight) for old, weight in before.terms)
    same = layer.zero == before.zero
    return same and not layer.own and not before.own and layer.terms == counted_up


def _row(first: int, last: int, layers: tuple[LayerSource, ...]) -> tuple[str, str, str]:
    new = f"{first}" if first == last else f"{first}-{last}"
    if layers[first].random:
        return new, "random", ""
    old = " + ".join(
        (f"{a}" if first == last else f"{a}-{b}") + ("" if weight == 1 else f" × {weight:g}")
        for (a, weight), (b, _) in zip(layers[first].terms, layers[last].terms, strict=True)
    )
    own = (f"{name} mixed on its own" for name in layers[first].own)
    return new, old, ", ".join([*layers[first].zero, *own])
