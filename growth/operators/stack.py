"""Stacking: the whole block sequence, several times over."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..plan import GrowthPlan, LayerSource
from ._depth import check_growth, deeper, depth_of


@dataclass(frozen=True)
class Stack:
    """G_stack: new layer l is a copy of old layer l mod L, so the blocks keep their order.

    The function changes: the loss rises at once and falls again within a few hundred steps.

    Args:
        factor: how many times deeper the grown model is, 2 unless given; the paper advises 4, and
            2 is close. Where the last repetition is not whole, it is of the first layers.
        layers: of the grown model, instead of a factor.

    Raises:
        ValueError: the grown model would not be deeper, or have no whole number of layers.

    Source: Stacking Your Transformers, arXiv 2405.15319, depthwise G_direct.
    """

    factor: float | None = None
    layers: int | None = None

    def __post_init__(self) -> None:
        check_growth(self.factor, self.layers)

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan for a model with this config."""
        old = depth_of(config)
        new = deeper(old, self.factor, self.layers)
        layers = tuple(LayerSource(((at % old, 1.0),)) for at in range(new))
        notes = ("blocks that follow each other were not trained to",)
        return GrowthPlan("stack", asdict(self), config["model_type"], layers, notes=notes)
