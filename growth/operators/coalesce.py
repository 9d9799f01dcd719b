"""From a large level to a small one: averages of layers and of directions."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..plan import GrowthPlan
from ..spaces import architecture_of
from ..spaces.sizes import config_sizes
from ._depth import depth_of
from .decoalesce import Decoalesce, check_factors
from .widen import Widen


@dataclass(frozen=True)
class Coalesce:
    """The model of `factor` times fewer layers and directions, by averages of those that it joins.

    Neighbouring layers are averaged. Directions i, i + n, … of a space of n new ones become one:
    what writes them is averaged, what reads them summed. It is the inverse of `Decoalesce`.

    Args:
        factor: in width (hidden, ffn, heads, kv_heads) and depth.
        width, depth: their own factors, 1 to leave them.

    Raises:
        ValueError: a factor is no integer of at least 1, both are 1, or a size is not divisible.

    Source: A Multi-Level Framework, arXiv 2404.07999, coalescing; heads are joined whole.
    """

    factor: int = 2
    width: int | None = None
    depth: int | None = None

    def __post_init__(self) -> None:
        check_factors(self.factor, self.width, self.depth)

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan for a model with this config."""
        table = architecture_of(config)
        width, depth = self.width or self.factor, self.depth or self.factor
        old = table.sizes(config)
        wider = Widen(factor=float(width)).plan(config).spaces
        sizes = {space: _share(old[space], width, space) for space in wider}
        small = dict(config) | config_sizes(table, config, sizes)
        small[table.depth_key] = _share(depth_of(config), depth, "layers")
        back = Decoalesce(self.factor, self.width, self.depth).plan(small).inverse()
        notes = ("directions and layers are averages of several",)
        return replace(back, operator="coalesce", options=asdict(self), notes=notes)


def _share(size: int, factor: int, what: str) -> int:
    if size % factor:
        raise ValueError(
            f"{what} is {size}; expected a multiple of factor {factor}: give width or depth"
        )
    return size // factor
