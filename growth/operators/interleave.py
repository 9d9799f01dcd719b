"""Interleaving: each layer several times, one after the other."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..plan import GrowthPlan, LayerSource
from ._depth import check_growth, deeper, depth_of


@dataclass(frozen=True)
class Interleave:
    """New layer l of N is a copy of old layer floor(l L / N): l // factor where that is whole.

    The function changes, as by `Stack`, but neighbours stay neighbours.

    Args:
        factor: how many times deeper the grown model is, 2 unless given.
        layers: of the grown model, instead of a factor.

    Raises:
        ValueError: the grown model would not be deeper, or have no whole number of layers.

    Source: Multi-level Residual Networks, arXiv 1710.10348; "interpolation" in Stacking Your
        Transformers, arXiv 2405.15319.
    """

    factor: float | None = None
    layers: int | None = None

    def __post_init__(self) -> None:
        check_growth(self.factor, self.layers)

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan for a model with this config."""
        old = depth_of(config)
        new = deeper(old, self.factor, self.layers)
        layers = tuple(LayerSource(((at * old // new, 1.0),)) for at in range(new))
        notes = ("each copy of a layer adds to the residual stream once more",)
        return GrowthPlan("interleave", asdict(self), config["model_type"], layers, notes=notes)
