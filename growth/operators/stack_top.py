"""Growing at the top: copies of the last layers, which alone are trained at first."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..plan import GrowthPlan, LayerSource
from ..spaces import architecture_of
from ._depth import check_count, depth_of


@dataclass(frozen=True)
class StackTop:
    """The old layers, then the last ones again: new layer l is old layer l, or l - add.

    Args:
        add: how many layers are new.

    Raises:
        ValueError: more are new than there are to copy.

    Source: Progressively Stacking 2.0 (MSLT), arXiv 2011.13635.
    """

    add: int = 1

    def __post_init__(self) -> None:
        check_count("add", self.add, least=1)

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan for a model with this config."""
        old = depth_of(config)
        if self.add > old:
            raise ValueError(f"add is {self.add}; expected at most the {old} layers that there are")
        sources = [*range(old), *range(old - self.add, old)]
        layers = tuple(LayerSource(((source, 1.0),)) for source in sources)
        notes = ("the last layers run twice",)
        return GrowthPlan("stack-top", asdict(self), config["model_type"], layers, notes=notes)

    def trains(self, config: Mapping[str, Any]) -> str:
        """Return a regular expression for the names that MSLT trains next: the new layers' alone.

        The backward pass then ends at the first of them. The paper trains all layers at the end.

        Args:
            config: of the model before it grows.
        """
        old = depth_of(config)
        new = "|".join(str(at) for at in range(old, old + self.add))
        before, _, after = architecture_of(config).layer_prefix.partition("{layer}")
        return f"^{re.escape(before)}({new}){re.escape(after)}"
