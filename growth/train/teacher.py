"""The model that a stage's objective learns from: a checkpoint, or the run's own past."""

import copy
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import apical

from ..objectives import Distillation, SoftLabels, TokenScores, token_scores
from .head import run_to_head
from .model import load_pretrained, model_of_config, model_tensors

if TYPE_CHECKING:
    from .outline import StagePlan


class Teacher:
    """A model that is never trained.

    Args:
        model: becomes the teacher's own, in evaluation and without gradients.
        saved: whether the run is where its weights come from, so that checkpoints keep them.
    """

    def __init__(self, model: PreTrainedModel, *, saved: bool) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self._saved = saved
        apical.use_kernels(self.model)

    @torch.no_grad()
    def labels(self, inputs: Mapping[str, Any], objective: Distillation) -> SoftLabels:
        """Return the soft labels of a batch."""
        hidden, weight, head = run_to_head(self.model, inputs)
        return objective.labels(hidden, weight, **head)

    @torch.no_grad()
    def scores(self, inputs: Mapping[str, Any], target: Tensor, *, top_k: int) -> TokenScores:
        """Return loss and rank of every token of a batch."""
        hidden, weight, head = run_to_head(self.model, inputs)
        return token_scores(hidden, weight, target, top_k=top_k, **head)

    def tensors(self) -> dict[str, Any]:
        """Return the live tensors that belong into a checkpoint."""
        return {"teacher": model_tensors(self.model)} if self._saved else {}

    def digest(self) -> str:
        """Return the SHA-256 of the architecture and the weights."""
        digest = hashlib.sha256(self.model.config.to_json_string().encode())
        for name, tensor in model_tensors(self.model).items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def first_teacher(
    plan: "StagePlan", previous: PreTrainedModel | None, model: PreTrainedModel
) -> Teacher | None:
    """Return the teacher of a stage before its first step; None where it has none.

    Args:
        plan: of the stage.
        previous: the model that the stage before ended with.
        model: the stage's own, which is left as it is.
    """
    if plan.teacher is None:
        return None
    directory = plan.spec.objective.teacher_directory
    if directory is not None:
        return Teacher(load_pretrained(directory, model.device), saved=False)
    past = model if plan.spec.objective.kind == "self_distillation" else previous
    assert past is not None
    return Teacher(copy.deepcopy(past), saved=True)


def empty_teacher(plan: "StagePlan", *, device: torch.device) -> Teacher | None:
    """Return the teacher of a stage for a checkpoint to be read into."""
    if plan.teacher is None:
        return None
    directory = plan.spec.objective.teacher_directory
    if directory is not None:
        return Teacher(load_pretrained(directory, device), saved=False)
    return Teacher(model_of_config(plan.teacher).to(device), saved=True)
