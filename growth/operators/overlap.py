"""Depth up-scaling: two copies of the model, without the layers that would meet."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..plan import GrowthPlan, LayerSource
from ._depth import check_count, depth_of


@dataclass(frozen=True)
class Overlap:
    """All but the last n layers, then all but the first n: 2 (L - n) layers.

    Args:
        drop: n; a quarter of the layers unless given, as 8 of 32 in the paper.

    Raises:
        ValueError: drop is half of the layers or more, so that none would be new.

    Source: SOLAR 10.7B, arXiv 2312.15166, depth up-scaling.
    """

    drop: int | None = None

    def __post_init__(self) -> None:
        check_count("drop", self.drop, least=0)

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan for a model with this config."""
        old = depth_of(config)
        drop = old // 4 if self.drop is None else self.drop
        if 2 * drop >= old:
            raise ValueError(f"drop is {drop}; expected less than half of the {old} layers")
        layers = tuple(LayerSource(((at, 1.0),)) for at in [*range(old - drop), *range(drop, old)])
        notes = ("blocks that follow each other were not trained to",)
        return GrowthPlan("overlap", asdict(self), config["model_type"], layers, notes=notes)
