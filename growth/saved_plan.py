"""An operator that does what a file says."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan import GrowthPlan
from .spaces import architecture_of


@dataclass(frozen=True)
class SavedPlan:
    """The plan of a file, whatever made it.

    Args:
        path: of a plan.yaml as `GrowthPlan.to_yaml` gives it, or an apical_growth.json.
    """

    path: str | Path

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan for a model with this config.

        Raises:
            FileNotFoundError: the file is not there.
            ValueError: it holds no plan, or that of a model of another family or size.
        """
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"{self.path} is no file; expected a plan in YAML")
        plan = GrowthPlan.from_yaml(Path(self.path).read_text(encoding="utf-8"))
        table = architecture_of(config)
        sizes: dict[str, Any] = {**table.sizes(config), "layers": config[table.depth_key]}
        for space, found in plan.spaces.items():
            self._check(space, found.old, sizes.get(space, found.old))
        self._check("model_type", plan.model_type, config["model_type"])
        last = max(old for layer in plan.layers for old, _ in layer.terms)
        if last >= sizes["layers"]:
            self._check("layers", f"at least {last + 1}", sizes["layers"])
        return plan

    def _check(self, what: str, planned: Any, found: Any) -> None:
        if planned != found:
            raise ValueError(
                f"{self.path} is for a model with {what} {planned}, this one has {found}; "
                "expected the plan of a model of this size"
            )
