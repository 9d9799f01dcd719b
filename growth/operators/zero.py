"""Function-preserving depth: copies that add nothing until they are trained."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..plan import GrowthPlan, LayerSource
from ..spaces import architecture_of
from ._factor import check_factor


@dataclass(frozen=True)
class Zero:
    """Each old layer, followed by copies of it whose weights into the residual stream are zero.

    New layer l comes from old layer l // factor; all but the first of each group add exactly zero
    to both residual branches, so the grown model computes what the old one does. The zero weights
    receive a gradient from the first step on, the rest of a copy from the second.

    Args:
        factor: how many times deeper the grown model is.

    Raises:
        ValueError: factor is not an integer of at least 2.

    Source: LLaMA Pro, arXiv 2401.02415, block expansion; G_zero of arXiv 2405.15319 in depth.
    """

    factor: int = 2

    def __post_init__(self) -> None:
        check_factor(self.factor)

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan for a model with this config."""
        table = architecture_of(config)
        silent = table.residual_weights(config)
        layers = [
            LayerSource(((old, 1.0),), silent if copy else ())
            for old in range(config[table.depth_key])
            for copy in range(self.factor)
        ]
        return GrowthPlan(
            "zero", asdict(self), config["model_type"], tuple(layers), preserves_function=True
        )
