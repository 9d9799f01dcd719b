"""Function-preserving depth: copies that add nothing until they are trained."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..plan import GrowthPlan, LayerSource
from ..spaces import architecture_of
from ._depth import check_count, check_growth, deeper, depth_of


@dataclass(frozen=True)
class ZeroDepth:
    """Old layers, with copies between them whose weights into the residual stream are zero.

    A copy adds exactly zero to both residual branches, so the grown model computes what the old one
    does. It stands behind its layer: by a factor g, new layer l comes from old layer l // g. The
    zero weights receive a gradient from the first step on, the rest of a copy from the second.

    Args:
        factor: how many times deeper the grown model is, 2 unless anything is given.
        layers: of the grown model, instead of a factor; copies are spread evenly.
        every: instead of both: one copy behind each group of so many layers.

    Raises:
        ValueError: the grown model would not be deeper or have no whole number of layers, groups
            are not whole, or no layer of the family can add nothing.

    Source: LLaMA Pro, arXiv 2401.02415, block expansion; G_zero of arXiv 2405.15319 in depth.
    """

    factor: float | None = None
    layers: int | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        check_growth(self.factor, self.layers)
        check_count("every", self.every, least=1)
        if self.every is not None and (self.factor or self.layers):
            raise ValueError(f"every is {self.every}, beside factor or layers; expected one")

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan for a model with this config."""
        silent = architecture_of(config).residual_weights(config)
        if not silent:
            raise ValueError(
                f"no layer of a {config['model_type']} can add nothing: its residual stream is "
                "normalised after each branch; use Stack or Interleave"
            )
        old = depth_of(config)
        new = deeper(old, self.factor, self._layers(old))
        # the last of a group is the one with copies, hence l + 1
        sources = [((at + 1) * old - 1) // new for at in range(new)]
        layers = tuple(
            LayerSource(((source, 1.0),), silent if at and source == sources[at - 1] else ())
            for at, source in enumerate(sources)
        )
        options = asdict(self)
        return GrowthPlan(
            "zero-depth", options, config["model_type"], layers, preserves_function=True
        )

    def _layers(self, old: int) -> int | None:
        if self.every is None:
            return self.layers
        if old % self.every:
            raise ValueError(f"every is {self.every}; expected a divisor of the {old} layers")
        return old + old // self.every
