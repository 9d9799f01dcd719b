"""Layers in place of nn.Linear that store and compute less."""

from ._base import StructuredLinear
from .block import BlockLinear
from .low_rank import LowRankLinear
from .masked import MaskedLinear
from .monarch import MonarchLinear
from .sparse_low_rank import SparseLowRankLinear

__all__ = [
    "BlockLinear",
    "LowRankLinear",
    "MaskedLinear",
    "MonarchLinear",
    "SparseLowRankLinear",
    "StructuredLinear",
]
