"""Growth by a plan that was fitted beforehand: LiGO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..plan import GrowthPlan
from ..spaces import architecture_of


@dataclass(frozen=True)
class Learned:
    """LiGO: new weights are a linear function of the old ones that was fitted on the loss.

    Args:
        fitted: what `apical.fit_growth` returned for this model, or one of its sizes.

    Source: LiGO, arXiv 2303.00980.
    """

    fitted: GrowthPlan

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the fitted plan for a model with this config.

        Raises:
            ValueError: it was fitted for a model of another family or other sizes.
        """
        table = architecture_of(config)
        sizes, depth = table.sizes(config), config[table.depth_key]
        wrong = [space for space, m in self.fitted.spaces.items() if sizes[space] != m.old]
        read = {old for layer in self.fitted.layers for old, _ in layer.terms}
        if self.fitted.model_type != config["model_type"] or wrong or max(read) >= depth:
            found = {space: m.old for space, m in self.fitted.spaces.items()}
            raise ValueError(
                f"fitted is a plan for a {self.fitted.model_type} with {max(read) + 1} layers and "
                f"{found}; expected one for a {config['model_type']} with {depth} layers: fit again"
            )
        return self.fitted
