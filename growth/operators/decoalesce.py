"""From a small level to a large one: every layer and every direction several times."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..plan import GrowthPlan
from ._depth import check_count, depth_of
from .interleave import Interleave
from .widen import Widen


@dataclass(frozen=True)
class Decoalesce:
    """Undoes `Coalesce`: each layer stands `factor` times, and so does each direction of a layer.

    Copies of directions share the weight with which they are read, so width alone keeps the
    function; layers that run twice change it. `Interpolate` with the large model of before breaks
    the symmetry of copies.

    Args:
        factor: in width (hidden, ffn, heads, kv_heads) and depth.
        width, depth: their own factors, 1 to leave them.

    Raises:
        ValueError: a factor is no integer of at least 1, or both are 1.

    Source: A Multi-Level Framework, arXiv 2404.07999, de-coalescing; heads are copied whole, and
        what lies before a norm is scaled, so that the width is exact.
    """

    factor: int = 2
    width: int | None = None
    depth: int | None = None

    def __post_init__(self) -> None:
        check_factors(self.factor, self.width, self.depth)

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan for a model with this config."""
        width, depth = self.width or self.factor, self.depth or self.factor
        # by a factor of 1 nothing changes
        found = Widen(factor=float(width), split=0.0).plan(config)
        if depth > 1:
            deeper = Interleave(layers=depth * depth_of(config)).plan(config)
            found = replace(found, layers=deeper.layers, notes=found.notes + deeper.notes)
        return replace(
            found,
            operator="decoalesce",
            options=asdict(self),
            fill=None,
            preserves_function=not found.notes,
        )


def check_factors(factor: int, width: int | None, depth: int | None) -> None:
    """Check the factors of one level.

    Raises:
        ValueError: one is no integer of at least 1, or nothing would change.
    """
    for name, value in (("factor", factor), ("width", width), ("depth", depth)):
        check_count(name, value, least=1)
    if (width or factor) == 1 == (depth or factor):
        raise ValueError("width and depth are 1, so nothing changes; expected factor 2 or more")
