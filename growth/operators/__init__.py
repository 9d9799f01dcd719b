"""Growth operators: each is a frozen dataclass whose `plan(config)` says what a grown model is."""

from .advanced_knowledge import AdvancedKnowledge
from .coalesce import Coalesce
from .decoalesce import Decoalesce
from .interleave import Interleave
from .learned import Learned
from .linear_expand import LinearExpand
from .overlap import Overlap
from .progressive import progressive, progressive_top
from .random_depth import RandomDepth
from .stack import Stack
from .stack_top import StackTop
from .widen import Widen
from .zero_depth import ZeroDepth

OPERATORS: dict[str, type] = {
    "stack": Stack,
    "interleave": Interleave,
    "zero-depth": ZeroDepth,
    "random-depth": RandomDepth,
    "overlap": Overlap,
    "stack-top": StackTop,
    "linear-expand": LinearExpand,
    "widen": Widen,
    "advanced-knowledge": AdvancedKnowledge,
    "coalesce": Coalesce,
    "decoalesce": Decoalesce,
}

__all__ = [
    "OPERATORS",
    "AdvancedKnowledge",
    "Coalesce",
    "Decoalesce",
    "Interleave",
    "Learned",
    "LinearExpand",
    "Overlap",
    "RandomDepth",
    "Stack",
    "StackTop",
    "Widen",
    "ZeroDepth",
    "progressive",
    "progressive_top",
]
