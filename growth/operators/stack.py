"""Stacking: the whole block sequence, several times over."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..plan import GrowthPlan, LayerSource
from ..spaces import architecture_of
from ._factor import check_factor


@dataclass(frozen=True)
class Stack:
    """G_stack: new layer l is a copy of old layer l mod L, so the blocks keep their order.

    The function changes: the loss rises at once and falls again within a few hundred steps.

    Args:
        factor: how many times deeper the grown model is; the paper advises 4, and 2 is close.

    Raises:
        ValueError: factor is not an integer of at least 2.

    Source: Stacking Your Transformers, arXiv 2405.15319, depthwise G_direct.
    """

    factor: int = 2

    def __post_init__(self) -> None:
        check_factor(self.factor)

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan for a model with this config."""
        depth = config[architecture_of(config).depth_key]
        layers = [LayerSource(((new % depth, 1.0),)) for new in range(self.factor * depth)]
        return GrowthPlan("stack", asdict(self), config["model_type"], tuple(layers))
