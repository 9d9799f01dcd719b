"""Linear projection and cross-entropy in one, without the logits in memory."""

from .api import LinearCrossEntropyOutput, linear_cross_entropy

__all__ = ["LinearCrossEntropyOutput", "linear_cross_entropy"]
