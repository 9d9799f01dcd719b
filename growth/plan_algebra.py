"""Plans one after the other, and plans that lead back."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from .maps import LinearMap, SpaceMap
from .plan import Fill, GrowthPlan, LayerSource, Terms
from .spaces import architecture_of
from .widths import before_layer_norm, before_rms

_APART = "apply one plan after the other"


def inverse(plan: GrowthPlan) -> GrowthPlan:
    """See `GrowthPlan.inverse`."""
    if any(space.ahead is not None for space in plan.spaces.values()):
        raise ValueError(f"{plan.operator} mixes layers in their width; nothing can bring it back")
    if plan.fill and plan.fill.noise and any(map(_copies, plan.spaces.values())):
        raise ValueError(f"{plan.operator} adds noise to weights; nothing can bring them back")
    if any(layer.own for layer in plan.layers):
        raise ValueError(
            f"{plan.operator} mixes each weight's layers on its own; nothing leads back"
        )
    if plan.config:
        raise ValueError(
            f"{plan.operator} sets config keys {sorted(plan.config)}; nothing leads back"
        )
    return replace(
        plan,
        operator=f"inverse of {plan.operator}",
        layers=_layers_back(plan),
        spaces={name: space.inverse() for name, space in plan.spaces.items()},
        fill=None,
        preserves_function=False,
        notes=("what copies have learned apart from each other is averaged",),
    )


def _layers_back(plan: GrowthPlan) -> tuple[LayerSource, ...]:
    whole = [new for new, layer in enumerate(plan.layers) if not layer.zero and not layer.random]
    count = 1 + max(old for layer in plan.layers for old, _ in layer.terms)
    matrix = torch.zeros(len(plan.layers), count, dtype=torch.float64)  # (new, old)
    for new in whole:
        for old, weight in plan.layers[new].terms:
            matrix[new, old] += weight
    lost = (matrix == 0).all(dim=0).nonzero()[:, 0].tolist()
    if lost:
        raise ValueError(f"{plan.operator} keeps no whole copy of layer {lost[0]}; it is lost")
    # copies are averaged, and an average is given to all that it is of
    back = torch.linalg.pinv(matrix).tolist()
    tidy = ([(new, _tidy(weight)) for new, weight in enumerate(row)] for row in back)
    return tuple(LayerSource(tuple(term for term in row if term[1])) for row in tidy)


def _tidy(weight: float) -> float:
    # a whole copy is bit for bit only by a weight of exactly 1
    simple = float(Fraction(weight).limit_denominator(1000))
    return simple if abs(simple - weight) < 1e-12 else weight


def compose(first: GrowthPlan, second: GrowthPlan) -> GrowthPlan:
    """See `GrowthPlan.compose`."""
    _check_fits(first, second)
    _check_said(first, second)
    spaces = dict(first.spaces)
    for name, found in second.spaces.items():
        spaces[name] = _after(name, found, first) if name in first.spaces else found
    fills = [plan.fill for plan in (first, second) if plan.fill and _draws(plan)]
    return GrowthPlan(
        f"{first.operator}, {second.operator}",
        _options(first, second),
        first.model_type,
        tuple(_substituted(layer, first) for layer in second.layers),
        spaces,
        {**first.config, **second.config},
        fills[0] if fills else None,
        first.preserves_function and second.preserves_function,
        tuple(dict.fromkeys(first.notes + second.notes)),
    )


def _options(first: GrowthPlan, second: GrowthPlan) -> dict[str, object]:
    """Return both plans' options, those of the second under other names where names are shared."""
    given = [{k: v for k, v in plan.options.items() if v is not None} for plan in (first, second)]
    shared = given[0].keys() & given[1].keys()
    return given[0] | {f"then_{k}" if k in shared else k: v for k, v in given[1].items()}


def _check_fits(first: GrowthPlan, second: GrowthPlan) -> None:
    if first.model_type != second.model_type:
        raise ValueError(
            f"the following plan is for a {second.model_type}; expected a {first.model_type}"
        )
    needed = 1 + max(old for layer in second.layers for old, _ in layer.terms)
    if needed > len(first.layers):
        raise ValueError(
            f"the following plan is for {needed} layers; expected {len(first.layers)} at most"
        )
    for name in first.spaces.keys() & second.spaces.keys():
        if first.spaces[name].new != second.spaces[name].old:
            raise ValueError(
                f"the following plan is for {name} {second.spaces[name].old}; "
                f"expected {first.spaces[name].new}"
            )


def _check_said(first: GrowthPlan, second: GrowthPlan) -> None:
    """Refuse what one plan cannot say: what is drawn or taken ahead depends on what was before."""
    if _draws(first):
        raise ValueError(f"{first.operator} draws random weights, which come first; {_APART}")
    deeper = any(layer != LayerSource(((at, 1.0),)) for at, layer in enumerate(first.layers))
    ahead = [any(m.ahead is not None for m in plan.spaces.values()) for plan in (first, second)]
    if (ahead[1] and (deeper or first.spaces)) or (ahead[0] and second.spaces):
        raise ValueError(f"what comes from the next layer depends on the order; {_APART}")
    noise = second.fill and second.fill.noise
    if noise and any(_copies(m) for name, m in first.spaces.items() if name in second.spaces):
        raise ValueError(f"{second.operator} adds noise to its own copies alone; {_APART}")


def _draws(plan: GrowthPlan) -> bool:
    fill = plan.fill or Fill()
    fresh = any((space.carries.sources() < 0).any() for space in plan.spaces.values()
                if space.carries.selects)  # fmt: skip
    copied = any(map(_copies, plan.spaces.values()))
    random = any(layer.random for layer in plan.layers)
    return bool(random or (fill.std and fresh) or (fill.noise and copied))


def _copies(space: SpaceMap) -> bool:
    return bool((torch.bincount(space.reads.column, minlength=space.old) > 1).any())


def _substituted(layer: LayerSource, first: GrowthPlan) -> LayerSource:
    middle = [first.layers[old] for terms in (layer.terms, *layer.own.values()) for old, _ in terms]
    if any(set(source.zero) != set(middle[0].zero) for source in middle):
        raise ValueError(f"a sum of layers has weights that are zero in some alone; {_APART}")
    inners = dict.fromkeys(inner for source in (layer, *middle) for inner in source.own)
    own = {inner: _terms(layer, first, inner) for inner in inners}
    silent = tuple(dict.fromkeys(layer.zero + middle[0].zero))
    return LayerSource(_terms(layer, first), silent, own, layer.random)


def _terms(layer: LayerSource, first: GrowthPlan, inner: str = "") -> Terms:
    weights: dict[int, float] = {}
    for middle, outer in layer.own.get(inner, layer.terms):
        source = first.layers[middle]
        for old, weight in source.own.get(inner, source.terms):
            weights[old] = weights.get(old, 0.0) + outer * weight
    return tuple(weights.items())


def _after(name: str, second: SpaceMap, plan: GrowthPlan) -> SpaceMap:
    first = plan.spaces[name]
    found = second.after(first)
    if not _follows_alike(name, first, second, found, plan.model_type):
        raise ValueError(f"{name} has copies of another number when it grows again; {_APART}")
    return found


def _follows_alike(
    name: str, first: SpaceMap, second: SpaceMap, found: SpaceMap, model_type: str
) -> bool:
    # what lies before a norm is worked out from the map, so it must be as if worked out twice
    norms = [before_rms]
    if name == "hidden" and architecture_of({"model_type": model_type}).norm == "layer":
        norms = [before_layer_norm]
    return all(
        _close(once.carries, twice.carries) and _close(once.reads, twice.reads)
        for norm in norms
        for once, twice in [(norm(found), norm(second).after(norm(first)))]
    )


def _close(one: LinearMap, other: LinearMap) -> bool:
    ours: Tensor = one.matrix()
    return torch.allclose(ours, other.matrix(), rtol=1e-9, atol=1e-12)
