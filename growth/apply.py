"""Runs a plan: over one tensor, and over a live model."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from apical._extras import require

from .plan import GrowthPlan, Operator, TensorSource
from .spaces import architecture_of, check_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")


def grow(model: Model, operator: Operator) -> Model:
    """Return a new, plain transformers model of the same class, grown by an operator.

    The result shares no storage with `model`, which is left as it is; dtypes, devices, tied
    embeddings, `requires_grad`, training mode and generation config are kept. It is plain even if
    `apical.use_kernels` was called on `model`: call it again on the result.

    Precision: copied weights are bit for bit the old ones.

    Args:
        model: a transformers causal language model with its weights in memory.
        operator: for example `apical.Stack(factor=2)`.

    Raises:
        ValueError: the model is no transformers model, or its weights are not those of its family.
        NotImplementedError: the model's family has no table in growth/spaces.py.
        ImportError: transformers is not installed.

    Source: ours.
    """
    transformers = require("transformers", extra="hf", what="apical.grow")
    if not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(f"model is a {type(model).__name__}; expected a transformers model")
    config = model.config.to_dict()
    plan = operator.plan(config)
    old = dict(model.named_parameters())
    check_tensors(config, {name: parameter.shape for name, parameter in old.items()})
    if any(parameter.is_meta for parameter in old.values()):
        raise ValueError("model has weights on the meta device; expected all of them in memory")
    grown = _skeleton(model, plan)
    for name in plan.names(old):
        source = plan.sources(name)
        tensor = grow_tensor(source, old.__getitem__)
        kept = old[source.terms[0][0]].requires_grad
        _set_parameter(grown, name, nn.Parameter(tensor, requires_grad=kept))
    if any(name not in old for name in architecture_of(config).tied):
        grown.tie_weights()
    return grown.train(model.training)


def grow_tensor(source: TensorSource, read: Callable[[str], Tensor], *, power: int = 1) -> Tensor:
    """Return one tensor of the grown model, in storage of its own.

    Precision: a plain copy is bit for bit; a sum is accumulated in at least float32.

    Args:
        source: what the tensor is made of.
        read: gives an old tensor by its name.
        power: 1 for weights and first moments, 2 to apply the squared map to second moments.

    Source: ours.
    """
    (name, weight), *others = source.terms
    first = read(name).detach()
    if source.zero:
        return torch.zeros_like(first, memory_format=torch.contiguous_format)
    if weight == 1 and not others:
        return first.clone(memory_format=torch.contiguous_format)
    total = first.to(torch.promote_types(first.dtype, torch.float32)) * weight**power
    for name, weight in others:
        total += read(name).detach() * weight**power
    return total.to(first.dtype)


def _skeleton(model: Model, plan: GrowthPlan) -> Model:
    """Return the grown model with buffers in place and weights that are still to be set."""
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(model.config)
    config.update(plan.config_changes(config.to_dict()))
    if config._attn_implementation == "apical":
        # use_kernels belongs to one instance: let transformers choose for the new one
        config._attn_implementation = None
    with no_init_weights():
        grown = type(model)(config)
    grown.generation_config = copy.deepcopy(model.generation_config)
    devices = {name: buffer.device for name, buffer in model.named_buffers()}
    for name, buffer in grown.named_buffers():
        buffer.data = buffer.to(devices[name])
    return grown


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)
