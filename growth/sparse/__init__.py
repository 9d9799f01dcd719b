"""Sparse and low-rank weights: layers in place of nn.Linear, and models converted to them."""

from .convert import replaced, sparsify
from .files import describe
from .layers import (
    BlockLinear,
    LowRankLinear,
    MaskedLinear,
    MonarchLinear,
    SparseLowRankLinear,
    StructuredLinear,
)
from .rules import Block, LowRank, Masked, Monarch, Rule, SparseLowRank

# by the names that a recipe and the command line have for them
RULES: dict[str, type[Rule]] = {
    "sparse_low_rank": SparseLowRank,
    "low_rank": LowRank,
    "masked": Masked,
    "monarch": Monarch,
    "block": Block,
}

__all__ = [
    "RULES",
    "Block",
    "BlockLinear",
    "LowRank",
    "LowRankLinear",
    "Masked",
    "MaskedLinear",
    "Monarch",
    "MonarchLinear",
    "Rule",
    "SparseLowRank",
    "SparseLowRankLinear",
    "StructuredLinear",
    "describe",
    "replaced",
    "sparsify",
]
