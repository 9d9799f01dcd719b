"""Training objectives on the fused loss, each of hidden states, a head and labels."""

from .distillation import Distillation, SoftLabels, soft_labels
from .documents import DocumentLosses, document_losses
from .emo import EMO
from .reweighting import Reweighted, document_weights
from .salt import Salt, TokenScores, median_scores, select_by_median_loss, token_scores
from .self_distillation import SelfDistillation
from .spherical import LogSphericalSoftmax, LogTaylorSoftmax, SphericalZLoss

__all__ = [
    "EMO",
    "Distillation",
    "DocumentLosses",
    "LogSphericalSoftmax",
    "LogTaylorSoftmax",
    "Reweighted",
    "Salt",
    "SelfDistillation",
    "SoftLabels",
    "SphericalZLoss",
    "TokenScores",
    "document_losses",
    "document_weights",
    "median_scores",
    "select_by_median_loss",
    "soft_labels",
    "token_scores",
]
