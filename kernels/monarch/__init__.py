"""Monarch matrices as weights: two block-diagonal matrices with a permutation between them."""

from .api import monarch_matmul

__all__ = ["monarch_matmul"]
