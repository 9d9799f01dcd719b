"""Depth with layers that know nothing yet."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..plan import Fill, GrowthPlan, LayerSource
from ._depth import check_growth, deeper, depth_of


@dataclass(frozen=True)
class RandomDepth:
    """G_random in depth: new layers start as those of a model that was never trained.

    Matrices are normal with the family's own deviation, biases 0, gains of norms 1. The paper masks
    new layers at first; here they count from the first step on, so the function changes.

    Args:
        factor: how many times deeper the grown model is, 2 unless given.
        layers: of the grown model, instead of a factor.
        where: "top": new layers follow the old ones; "between": they are spread evenly.
        seed: of the random weights.

    Raises:
        ValueError: the grown model would not be deeper, or have no whole number of layers.

    Source: Stacking Your Transformers, arXiv 2405.15319, depthwise G_random, without its masks.
    """

    factor: float | None = None
    layers: int | None = None
    where: Literal["top", "between"] = "top"
    seed: int = 0

    def __post_init__(self) -> None:
        check_growth(self.factor, self.layers)
        if self.where not in ("top", "between"):
            raise ValueError(f"where is {self.where!r}; expected 'top' or 'between'")

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan for a model with this config."""
        old = depth_of(config)
        new = deeper(old, self.factor, self.layers)
        top = [min(at, old - 1) for at in range(new)]
        between = [((at + 1) * old - 1) // new for at in range(new)]
        sources = top if self.where == "top" else between
        layers = tuple(
            # what is random still has the kind of attention of its neighbour
            LayerSource(((source, 1.0),), random=bool(at) and source == sources[at - 1])
            for at, source in enumerate(sources)
        )
        return GrowthPlan(
            "random-depth",
            asdict(self),
            config["model_type"],
            layers,
            fill=Fill(seed=self.seed),
            notes=("new layers add what random weights compute",),
        )
