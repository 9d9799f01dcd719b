"""Axes of weights: which spaces their directions belong to, read from a short notation."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor, as `parse` reads it.

    Args:
        parts: what lies one after the other along the axis; each a product, slowest first, of
            names of spaces, numbers that never grow, and axes of their own.
        reads: the weight reads these directions; otherwise it writes them.
    """

    parts: tuple[tuple[str | int | Axis, ...], ...]
    reads: bool = False

    def spaces(self) -> Iterator[str]:
        """Yield the names of the spaces, left to right."""
        for factor in (factor for part in self.parts for factor in part):
            if isinstance(factor, Axis):
                yield from factor.spaces()
            elif isinstance(factor, str):
                yield factor

    def fold(
        self,
        leaf: Callable[[str | int], T],
        product: Callable[[T, T], T],
        join: Callable[[list[T]], T],
    ) -> T:
        """Return the axis with its names and numbers, products and joins replaced by values."""

        def value(factor: str | int | Axis) -> T:
            return factor.fold(leaf, product, join) if isinstance(factor, Axis) else leaf(factor)

        return join([functools.reduce(product, map(value, part)) for part in self.parts])

    def size(self, sizes: Mapping[str, int]) -> int:
        """Return how long the axis is where spaces have these sizes."""
        return self.fold(
            lambda factor: factor if isinstance(factor, int) else sizes[factor],
            lambda slow, fast: slow * fast,
            sum,
        )


@functools.cache
def parse(text: str) -> Axis:
    """Return the axis that a notation means.

    `heads head_dim`: a product, heads slowest. `q | k`: one after the other. `heads (q | k)`: for
    each head, q and then k. `<ffn`: read, not written. Numbers are sizes that never grow.

    Raises:
        ValueError: the notation is not understood.
    """
    reads = text.startswith("<")
    tokens = re.findall(r"[a-z_]\w*|\d+|[|()]", text.removeprefix("<"))
    if "".join(tokens) != re.sub(r"\s", "", text.removeprefix("<")):
        raise ValueError(f"axis {text!r} is not understood; expected names, numbers, |, ( and )")
    axis, rest = _parts(tokens, reads=reads)
    if rest:
        raise ValueError(f"axis {text!r} has ) without (")
    return axis


def _parts(tokens: list[str], *, reads: bool = False) -> tuple[Axis, list[str]]:
    parts: list[list[str | int | Axis]] = [[]]
    while tokens and tokens[0] != ")":
        token, *tokens = tokens
        if token == "|":
            parts.append([])
        elif token == "(":
            inner, tokens = _parts(tokens)
            parts[-1].append(inner)
            if not tokens:
                raise ValueError("an axis has ( without )")
            tokens = tokens[1:]
        else:
            parts[-1].append(int(token) if token.isdecimal() else token)
    if not all(parts):
        raise ValueError("an axis has nothing beside | or within (); expected a space")
    return Axis(tuple(map(tuple, parts)), reads), tokens
