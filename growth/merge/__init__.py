"""Merging: one model out of several of the same architecture, on disk or in memory."""

from .directory import merge_checkpoints
from .live import merge
from .methods import EMA, Average, Linear, Method, Posterior, TaskVectors
from .soup import GreedySoup

__all__ = [
    "EMA",
    "Average",
    "GreedySoup",
    "Linear",
    "Method",
    "Posterior",
    "TaskVectors",
    "merge",
    "merge_checkpoints",
]
