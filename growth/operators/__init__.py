"""Growth operators: each is a frozen dataclass whose `plan(config)` says what a grown model is."""

from .stack import Stack
from .zero import Zero

OPERATORS: dict[str, type] = {"stack": Stack, "zero": Zero}

__all__ = ["OPERATORS", "Stack", "Zero"]
