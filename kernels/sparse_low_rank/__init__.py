"""Sparse plus low-rank matrices as weights: products with them, and which entries they store."""

from .api import sparse_low_rank
from .support import Support

__all__ = ["Support", "sparse_low_rank"]
