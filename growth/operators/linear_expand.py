"""Depth by a line: every layer lies on a line through two."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..plan import GrowthPlan, LayerSource
from ._depth import check_count, depth_of


@dataclass(frozen=True)
class LinearExpand:
    """TLEG: layer l of N, counted from 1, is theta_B + l / N theta_A, for any N.

    Args:
        layers: N; twice the old ones unless given.
        of: "ends": theta_A and theta_B are such that the old first and last layers are on the line,
            as they are in a model that was trained on it; "pair": the model has two layers, which
            are theta_B and theta_A themselves.

    Raises:
        ValueError: layers is no positive integer, or the model has not two layers.

    Source: Transformer as Linear Expansion of Learngene, arXiv 2312.05614; taking both from the
        ends of any model is ours.
    """

    layers: int | None = None
    of: Literal["ends", "pair"] = "ends"

    def __post_init__(self) -> None:
        check_count("layers", self.layers, least=1)
        if self.of not in ("ends", "pair"):
            raise ValueError(f"of is {self.of!r}; expected 'ends' or 'pair'")

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan for a model with this config."""
        old = depth_of(config)
        if old < 2 or (self.of == "pair" and old > 2):
            few = "exactly 2" if self.of == "pair" else "at least 2"
            raise ValueError(f"the model has {old} layers; LinearExpand of {self.of} needs {few}")
        new = self.layers or 2 * old
        terms = self._pair if self.of == "pair" else self._ends
        layers = tuple(LayerSource(terms((at + 1) / new, old)) for at in range(new))
        notes = ("layers lie on a line between two",)
        return GrowthPlan("linear-expand", asdict(self), config["model_type"], layers, notes=notes)

    @staticmethod
    def _pair(share: float, _: int) -> tuple[tuple[int, float], ...]:
        return (0, 1.0), (1, share)

    @staticmethod
    def _ends(share: float, old: int) -> tuple[tuple[int, float], ...]:
        # of B + A / old = first and B + A = last
        first = (1 - share) * old / (old - 1)
        both = (0, first), (old - 1, 1 - first)
        # the nearer end gives the kind of attention; an end itself is copied bit for bit
        return tuple(term for term in sorted(both, key=lambda term: -term[1]) if term[1])
