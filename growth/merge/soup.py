"""The greedy soup: models join an average, best first, as long as it does not get worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from .methods import Average, Method

Item = TypeVar("Item")


@dataclass(frozen=True)
class GreedySoup:
    """Average of the models that, one after another from the best, do not lower its score.

    Args:
        score: of what is merged, on held-out data; higher is better. It is given a model, a state
            dict or, by `merge_checkpoints`, the path of a directory, and is called at most 2 n - 1
            times for n models.

    Source: Model soups, arXiv 2203.05482, Recipe 1.
    """

    score: Callable[[Any], float]

    def choose(
        self, items: Sequence[Item], mix: Callable[[tuple[int, ...]], AbstractContextManager[Any]]
    ) -> list[int]:
        """Return which items are in the soup, best first.

        Args:
            items: what is scored alone.
            mix: gives the average of some of them, by their numbers, for a while.

        Raises:
            ValueError: no item has a score.
        """
        alone = [_number(self.score(item)) for item in items]
        if max(alone) == -math.inf:
            raise ValueError("score is NaN or -inf for every model; expected a finite number")
        # stable: of equal scores, the first given comes first
        order = sorted(range(len(items)), key=lambda i: -alone[i])
        chosen, best = [order[0]], alone[order[0]]
        for i in order[1:]:
            # sorted: the result is then a function of the set, bit for bit
            with mix(tuple(sorted([*chosen, i]))) as candidate:
                score = _number(self.score(candidate))
            if score >= best:
                chosen, best = [*chosen, i], score
        return chosen


def resolve(
    method: Method | GreedySoup,
    items: Sequence[Item],
    mix: Callable[[tuple[int, ...]], AbstractContextManager[Any]],
) -> tuple[float, ...]:
    """Return the coefficient of each item; a greedy soup is made and scored for that.

    Raises:
        ValueError: the method has numbers for more or fewer items.
    """
    if not isinstance(method, GreedySoup):
        return method.coefficients(len(items))
    chosen = method.choose(items, mix)
    return Average([float(i in chosen) for i in range(len(items))]).coefficients(len(items))


def _number(score: float) -> float:
    # what diverged is worse than anything
    return -math.inf if math.isnan(score) else float(score)
