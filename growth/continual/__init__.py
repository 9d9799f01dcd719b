"""Continual pre-training: learning-rate schedules, and mixtures with replay."""

from .mixture import Mixture, replay, token_weights
from .schedules import Infinite, RewarmCosine, Schedule, ScheduleLR

__all__ = [
    "Infinite",
    "Mixture",
    "RewarmCosine",
    "Schedule",
    "ScheduleLR",
    "replay",
    "token_weights",
]
