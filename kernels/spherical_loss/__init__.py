"""Losses of a whole vocabulary from three numbers per token, without any logits."""

from ._losses import log_spherical_softmax, log_taylor_softmax, standardized_loss
from ._statistics import SphericalStatistics
from .api import spherical_loss, spherical_statistics

__all__ = [
    "SphericalStatistics",
    "log_spherical_softmax",
    "log_taylor_softmax",
    "spherical_loss",
    "spherical_statistics",
    "standardized_loss",
]
