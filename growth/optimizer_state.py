"""Grows the state of an optimizer by the plan that grew its model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .apply import grow_tensor
from .plan import GrowthPlan, TensorSource

# first moments follow the map of the weights, second moments the squared map
_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


def grow_optimizer(
    plan: GrowthPlan,
    state: Mapping[str, Mapping[str, Any]],
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, dict[str, Any]]:
    """Return the optimizer state of the grown model, keyed by parameter name.

    A weight that the plan sets to zero starts anew: zero moments at step 0, so that Adam corrects
    their bias; every other step count is kept. A parameter whose old parameter has no state
    (frozen, or never used) has none either.

    Precision: as `grow_tensor`; the result shares no storage with `state`.

    Args:
        plan: the plan that grew the model.
        state: old parameter name -> {"exp_avg", "exp_avg_sq", "step", …}, as torch's AdamW, Adam
            or SGD keep it; tied weights stand under the one name `named_parameters` gives.
        shapes: name -> shape of every parameter of the grown model.

    Raises:
        ValueError: a state of an unknown kind, or one whose shape is not its parameter's.

    Source: ours; the squared map for second moments follows from v being a mean of squares.
    """
    grown = {}
    for name, shape in shapes.items():
        source = plan.sources(name)
        if all(old in state for old, _ in source.terms):
            kinds = state[source.terms[0][0]]
            grown[name] = {kind: _grow_one(source, state, kind) for kind in kinds}
            _check_shapes(name, grown[name], tuple(shape))
    return grown


def _grow_one(source: TensorSource, state: Mapping[str, Mapping[str, Any]], kind: str) -> Any:
    first = state[source.terms[0][0]][kind]
    if kind == "step":
        count = 0 if source.zero else int(first)
        return torch.full_like(first, count) if isinstance(first, Tensor) else count
    if kind not in _POWERS:
        raise ValueError(
            f"optimizer state {kind!r} cannot be grown; known: step, {', '.join(_POWERS)}"
        )
    return grow_tensor(source, lambda old: state[old][kind], power=_POWERS[kind])


def _check_shapes(name: str, moments: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    for kind, value in moments.items():
        if kind in _POWERS and tuple(value.shape) != shape:
            raise ValueError(
                f"{kind} of {name} would have shape {tuple(value.shape)}; "
                f"expected its parameter's {shape}: the state is of another model"
            )
