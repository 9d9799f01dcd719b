"""Builds the model of a stage, and gives it the kernels that its recipe asks for."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch.optim import Optimizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import apical
from apical.hf.support import attention_refusal, loss_refusal

from ..optimizer_state import grow_optimizer
from ..per_layer import PerLayerOptimizer
from ..plan import GrowthPlan
from ..progress_bars import without_bars
from ..publish import published
from ..sparse import replaced, sparsify
from ..sparse.files import entry_of, restore_layers
from .optimizer import Moments, build_optimizer, moments, set_moments

if TYPE_CHECKING:
    from .outline import StagePlan


def first_model(
    plan: "StagePlan", previous: tuple[PreTrainedModel, Optimizer] | None, *, device: torch.device
) -> tuple[PreTrainedModel, Optimizer, str]:
    """Return a stage's model and optimizer before its first step, and a text on how they were made.

    Args:
        previous: model and optimizer that the stage before ended with.
        device: where a model that is not the previous one goes.
    """
    source, operator = plan.spec.model, plan.spec.model.operator()
    base = previous[0] if previous and source.from_ == "previous" else _load(plan, device)
    rule = plan.spec.rule()
    if previous and isinstance(previous[1], PerLayerOptimizer):
        previous[1].remove()
    if plan.spec.sparsity is not None and plan.teacher is not None:
        # the teacher may be the model before, as it was
        base = copy.deepcopy(base)
    if plan.spec.exports:
        base = apical.export_dense(base)
    model = apical.grow(base, operator) if operator else base
    growth = operator.plan(base.config.to_dict()) if operator else None
    model = sparsify(model, rule) if rule else model
    optimizer = _optimizer(model, plan)
    if previous and source.optimizer == "keep":
        set_moments(model, optimizer, _grown_moments(previous, model, growth))
    _set_kernels(model, plan)
    lines = [f"{type(model).__name__} from {source.from_}, moments: {source.optimizer}"]
    if layers := replaced(model):
        lines.append(f"{len(layers)} of its layers are sparse" + (f", by {rule}" if rule else ""))
    return (
        model,
        optimizer,
        "\n".join([*lines, *([str(growth)] if growth else []), apical.explain(model)]),
    )


def empty_model(
    plan: "StagePlan", generation: dict[str, Any], *, device: torch.device
) -> tuple[PreTrainedModel, Optimizer]:
    """Return a stage's model and optimizer for a checkpoint to be read into.

    Args:
        generation: the model's generation config.
    """
    model = model_of_config(plan.config).to(device)
    model.generation_config = GenerationConfig.from_dict(generation)
    optimizer = _optimizer(model, plan)
    _set_kernels(model, plan)
    return model, optimizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write a plain transformers directory, under another name until it is whole.

    Raises:
        OSError: the disk is full or not writable.
    """
    apical.use_kernels(model, attention=False, loss=False)
    try:
        with published(path, unfinished=path.with_name(f"{path.name}.tmp")) as unfinished:
            with without_bars():
                model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write the model {path}: {error}; --resume tries again") from error


def _load(plan: "StagePlan", device: torch.device) -> PreTrainedModel:
    source = plan.spec.model.from_
    if source == "scratch":
        return model_of_config(plan.base).to(device)
    return load_pretrained(source, device).train()


def load_pretrained(directory: str, device: torch.device) -> PreTrainedModel:
    """Return the model of a checkpoint directory, in float32."""
    sparse = entry_of(AutoConfig.from_pretrained(directory))
    load: Any = apical.load if sparse else AutoModelForCausalLM.from_pretrained
    with without_bars():
        model: Any = load(directory, dtype=torch.float32)
    return model.to(device)


def model_of_config(config: PretrainedConfig) -> Any:
    """Return a new model in float32, with the sparse layers that its config says."""
    return restore_layers(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def model_tensors(model: PreTrainedModel) -> dict[str, Any]:
    """Return the live weights and saved buffers of a model, by name."""
    kept = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in kept}
    # tied weights stand under one name here, and twice in a state dict
    return {name: p.detach() for name, p in model.named_parameters()} | buffers


def _grown_moments(
    previous: tuple[PreTrainedModel, Optimizer], model: PreTrainedModel, growth: GrowthPlan | None
) -> Moments:
    if growth is None:
        return moments(*previous)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return grow_optimizer(growth, previous[0].config.to_dict(), moments(*previous), shapes)


def _optimizer(model: PreTrainedModel, plan: "StagePlan") -> Optimizer:
    return build_optimizer(model, plan.spec.optimizer, peak=plan.spec.schedule.peak)


def check_kernels(plan: "StagePlan") -> None:
    """Check, without weights, that a stage's model and teacher take the kernels of its recipe.

    Raises:
        ValueError: they do not.
    """
    with torch.device("meta"):
        model = model_of_config(plan.config)
        teacher = plan.teacher and model_of_config(plan.teacher)
    _set_kernels(model, plan)
    reason = teacher and (attention_refusal(teacher) or loss_refusal(teacher))
    if reason:
        raise ValueError(f"stages[{plan.index}].objective: the teacher: {reason}")


def _set_kernels(model: PreTrainedModel, plan: "StagePlan") -> None:
    on, objective = plan.spec.kernels, plan.spec.objective
    # every other objective computes its own loss
    z_loss = objective.z_loss if objective.kind == "causal" else 0.0
    # packed documents must not see each other: the fused loss alone is not enough
    reason = attention_refusal(model) if on else None
    if reason:
        raise ValueError(f"stages[{plan.index}].kernels: {reason}; write `kernels: false`")
    apical.use_kernels(model, attention=on, loss=on, z_loss=z_loss)
    if z_loss and "_apical_loss" not in vars(model):
        raise ValueError(
            f"stages[{plan.index}].objective.z_loss is {z_loss}, which needs `kernels: true` and a "
            "model whose loss apical can compute; set it to 0"
        )
    reason = None if objective.kind == "causal" else loss_refusal(model)
    if objective.linear_logits and getattr(model.config, "final_logit_softcapping", None):
        reason = "final_logit_softcapping bends the logits, whose mean it takes"
    if reason:
        raise ValueError(
            f"stages[{plan.index}].objective.kind is {objective.kind}, which needs a model whose "
            f"loss apical can compute: {reason}; set it to causal"
        )
