"""Earth mover's distance of a language model to its labels, without the logits in memory."""

from .api import EmoLossOutput, emo_loss

__all__ = ["EmoLossOutput", "emo_loss"]
