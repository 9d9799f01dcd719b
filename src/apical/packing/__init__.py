"""Packing: which documents go together, on which rank, in which order, and as which batch.

Needs torch alone.
"""

from .balance import Cost, imbalance, plan
from .collator import PackedCollator
from .exchange import exchange
from .layout import document_bounds, position_ids
from .neighbours import hashed_embeddings, nearest_neighbours
from .ordering import ContextOrder, context_order
from .packers import PackStream, pack, pack_stream

__all__ = [
    "ContextOrder",
    "Cost",
    "PackStream",
    "PackedCollator",
    "context_order",
    "document_bounds",
    "exchange",
    "hashed_embeddings",
    "imbalance",
    "nearest_neighbours",
    "pack",
    "pack_stream",
    "plan",
    "position_ids",
]
