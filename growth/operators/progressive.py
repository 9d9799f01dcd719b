"""Schedules of growth: the operators that take a model from depth to depth."""

import itertools
from collections.abc import Sequence

from .stack import Stack
from .stack_top import StackTop


def progressive(depths: Sequence[int]) -> list[Stack]:
    """Return the operators that stack a model from depth to depth, as (3, 6, 12).

    Raises:
        ValueError: depths do not grow.

    Source: Efficient Training of BERT by Progressively Stacking, ICML 2019 (StackBERT, doubling).
    """
    return [Stack(layers=new) for _, new in _steps(depths)]


def progressive_top(depths: Sequence[int]) -> list[StackTop]:
    """Return the operators that grow a model at its top; `StackTop.trains` says what trains next.

    Raises:
        ValueError: depths do not grow.

    Source: Progressively Stacking 2.0 (MSLT), arXiv 2011.13635.
    """
    return [StackTop(add=new - old) for old, new in _steps(depths)]


def _steps(depths: Sequence[int]) -> list[tuple[int, int]]:
    steps = list(itertools.pairwise(depths))
    if not steps or any(new <= old for old, new in steps) or depths[0] < 1:
        raise ValueError(
            f"depths are {list(depths)}; expected two or more, each above the one before"
        )
    return steps
