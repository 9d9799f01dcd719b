"""A model taught by its own past: an earlier checkpoint, or the running mean of its weights."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check
from .distillation import Distillation, Tail


@dataclass(frozen=True, kw_only=True)
class SelfDistillation(Distillation):
    """Distillation from the mean of the model's own past weights.

        teacher <- decay * teacher + (1 - decay) * model     after every step

    Args:
        omega: share of the teacher.
        tail: of the teacher's tokens: the label's, so that an unsure model is not made sure.
        decay: of the mean; 1 keeps the teacher as it was at the start, an earlier checkpoint.

    Raises:
        ValueError: an argument is out of its range.

    Source: mean teachers, Tarvainen and Valpola 2017 (arXiv 1703.01780), in the loss of
    `Distillation`; the use for language models is ours.
    """

    omega: float = 0.5
    tail: Tail = "label"
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.decay <= 1, self, "decay", "from 0 to 1")

    @torch.no_grad()
    def follow(self, teacher: Iterable[Tensor], model: Iterable[Tensor]) -> None:
        """Move the teacher's parameters towards the model's, in place."""
        if self.decay < 1:
            for past, present in zip(teacher, model, strict=True):
                past.lerp_(present, 1 - self.decay)
