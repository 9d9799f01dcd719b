"""The loss of a batch: from a recipe's objective to one number with gradients."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..objectives import (
    EMO,
    Distillation,
    LogSphericalSoftmax,
    LogTaylorSoftmax,
    Reweighted,
    Salt,
    SelfDistillation,
    SoftLabels,
    SphericalZLoss,
)
from .data.batches import on_device
from .data.packing import PackedBatch
from .head import run_to_head
from .recipe.objective import Objective

if TYPE_CHECKING:
    from .recipe.schema import Stage
    from .teacher import Teacher

_IGNORED = -100


# the objectives that are not the model's own loss, by their kind in a recipe
_OBJECTIVES: dict[str, Callable[..., Any]] = {
    "salt": Salt,
    "self_distillation": SelfDistillation,
    "reweighted": Reweighted,
    "emo": EMO,
    "spherical_z": SphericalZLoss,
    "taylor_softmax": LogTaylorSoftmax,
    "spherical_softmax": LogSphericalSoftmax,
}


def build_objective(spec: Objective, *, steps: int) -> Any:
    """Return an objective of `growth.objectives`, with the recipe's fractions of `steps` as steps.

    None stands for the model's own loss.
    """
    if spec.kind == "causal":
        return None
    options = spec.model_dump(exclude={"kind", "teacher", "select", "transition"})
    if spec.kind == "salt":
        options["steps"] = round(spec.transition * steps)
    if spec.kind == "reweighted":
        options |= {"burn_in": round(spec.burn_in * steps), "steps": steps}
    return _OBJECTIVES[spec.kind](**options)


class BatchLoss:
    """The loss of a stage's batches.

    Args:
        stage: of the recipe.
        model: as the stage begins, or with its shapes where a checkpoint will be read.
        steps: of the stage.
        teacher: of an objective that has one.
    """

    def __init__(
        self, stage: "Stage", model: Any, *, steps: int, teacher: "Teacher | None" = None
    ) -> None:
        self._packed = stage.kernels
        self._teacher = teacher
        self._objective = objective = build_objective(stage.objective, steps=steps)
        head = model.get_output_embeddings()
        self._costs = objective.costs_of(head.weight) if isinstance(objective, EMO) else None

    def tensors(self) -> dict[str, Any]:
        """Return what belongs into a checkpoint: live tensors, by name."""
        kept = {} if self._costs is None else {"costs": {"weight": self._costs}}
        return kept | (self._teacher.tensors() if self._teacher else {})

    def needs_teacher(self, step: int) -> bool:
        """Return whether a step, counted from 0 in the stage, is taught."""
        if isinstance(self._objective, Salt):
            return self._objective.distils(step)
        return self._teacher is not None

    def __call__(self, model: PreTrainedModel, batch: PackedBatch, *, step: int) -> Tensor:
        """Return the loss of a step, a scalar."""
        inputs = on_device(batch.model_inputs(packed=self._packed), model.device)
        objective = self._objective
        if objective is None:
            return model(**inputs).loss
        more: dict[str, Any] = {}
        if isinstance(objective, EMO):
            more = {"costs": self._costs}
        if isinstance(objective, Reweighted):
            more = {"cu_seqlens": inputs["cu_seq_lens_q"], "step": step}
        if isinstance(objective, Distillation):
            more = {"labels": self._labels(objective, inputs, step)}
        hidden, weight, head = run_to_head(model, inputs)
        return objective(hidden, weight, next_tokens(inputs["labels"]), **head, **more)

    def _labels(
        self, objective: Distillation, inputs: dict[str, Any], step: int
    ) -> SoftLabels | None:
        assert self._teacher is not None
        return self._teacher.labels(inputs, objective) if self.needs_teacher(step) else None

    def after_step(self, model: PreTrainedModel) -> None:
        """Let a teacher that is the mean of the model's weights go on."""
        if isinstance(self._objective, SelfDistillation):
            assert self._teacher is not None
            teacher = self._teacher.model.parameters()
            self._objective.follow(teacher, model.parameters())


def next_tokens(labels: Tensor) -> Tensor:
    """Return the label of each token, the next one: (1, T) as transformers shifts them to (T,)."""
    return pad(labels[0], (0, 1), value=_IGNORED)[1:]
