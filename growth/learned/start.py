"""The known operators that a learned one starts from, as one plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..plan import GrowthPlan, Operator


def start_plan(start: Operator | Sequence[Operator], config: Mapping[str, Any]) -> GrowthPlan:
    """Return the plan of one operator, or of one that deepens and others that widen.

    Args:
        start: what to start from.
        config: of the model before it grows, with its defaults filled in.

    Raises:
        ValueError: two operators change the depth or one space, or a new direction has no copy.
    """
    operators = list(start) if isinstance(start, Sequence) else [start]
    if not operators:
        raise ValueError("start is empty; expected an operator, for example Stack(2)")
    first, *others = (operator.plan(config) for operator in operators)
    for plan in others:
        first = _both(first, plan)
    if any(layer.random for layer in first.layers):
        raise ValueError("start makes layers of random numbers; expected copies: use Stack")
    for space, found in first.spaces.items():
        written = torch.zeros(found.new, dtype=torch.bool)
        written[found.carries.row] = True
        if found.ahead is not None or not (written.all() or space == "qk_dim"):
            raise ValueError(
                f"start makes {space} of other things than copies; expected each new direction to "
                "be made of old ones: use Widen(new='copy')"
            )
    return replace(first, fill=None)


def deepens(plan: GrowthPlan) -> bool:
    """Return whether new layers are other than the old ones, in their order."""
    return any(
        layer.terms != ((i, 1.0),) or layer.zero or layer.own for i, layer in enumerate(plan.layers)
    )


def _both(first: GrowthPlan, second: GrowthPlan) -> GrowthPlan:
    if deepens(first) and deepens(second):
        raise ValueError(
            f"start changes the depth with {first.operator} and {second.operator}; expected one"
        )
    if twice := set(first.spaces) & set(second.spaces):
        raise ValueError(f"start maps {', '.join(sorted(twice))} twice; expected once")
    deep = second if deepens(second) else first
    return replace(
        deep, spaces={**first.spaces, **second.spaces}, config={**first.config, **second.config}
    )
