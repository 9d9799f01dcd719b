"""What an operator would do, before it does it."""

from os import PathLike
from pathlib import Path
from typing import Any

from .checkpoint_files import read_config, with_defaults
from .plan import GrowthPlan, Operator


def plan(model_or_config: Any, operator: Operator) -> GrowthPlan:
    """Return what an operator would do to a model, without doing it.

    Args:
        model_or_config: a transformers model or config, a config as a dict, or the directory of a
            checkpoint.
        operator: for example `apical.Stack(factor=2)`.

    Raises:
        ValueError: the operator does not fit the model.
        NotImplementedError: the model's family has no table.
    """
    found: Any = model_or_config
    if isinstance(found, str | PathLike):
        found = read_config(Path(found))
    found = getattr(found, "config", found)
    full = found.to_dict() if hasattr(found, "to_dict") else with_defaults(found)
    return operator.plan(full)
