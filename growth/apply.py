"""Runs a plan over a live model."""

import copy
import functools
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from apical._extras import require

from .mapping import Mapper
from .plan import GrowthPlan, Operator
from .spaces import Architecture, architecture_of, check_tensors
from .spaces.naming import Naming, shape_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")


def grow(
    model: Model, operator: Operator, *, shard: Callable[[Model], object] | None = None
) -> Model:
    """Return a new, plain transformers model of the same class, grown by an operator.

    The result shares no storage with `model`, which is left as it is; dtypes, devices, tied
    embeddings, `requires_grad`, training mode and generation config are kept. It is plain even if
    `apical.use_kernels` was called on `model`: call it again on the result.

    A model under `fully_shard` is never gathered as a whole: all ranks call this together, and each
    has one old and one new parameter at a time.

    Precision: copied weights are bit for bit the old ones.

    Args:
        model: a transformers model of any class, with its weights in memory.
        operator: for example `apical.Stack(factor=2)`.
        shard: for a sharded model: calls `fully_shard` on the grown one and its layers, before
            these have weights.

    Raises:
        ValueError: the model is no transformers model, its weights are not those of its family, or
            it is sharded without `shard`, or the other way round.
        NotImplementedError: the model's family has no table in growth/spaces.
        ImportError: transformers is not installed.

    Source: ours.
    """
    transformers = require("transformers", extra="hf", what="apical.grow")
    if not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(f"model is a {type(model).__name__}; expected a transformers model")
    config = model.config.to_dict()
    live = dict(model.named_parameters())
    naming = Naming.of(architecture_of(config), live)
    old = naming.places({name: parameter.shape for name, parameter in live.items()})
    config = as_tied(naming.table, config, old)
    plan = operator.plan(config)
    shapes = {whole: shape_at(place, live[place.name].shape) for whole, place in old.items()}
    check_tensors(config, shapes, head=naming.whole_model)
    if any(parameter.is_meta for parameter in live.values()):
        raise ValueError("model has weights on the meta device; expected all of them in memory")
    if any(isinstance(parameter, DTensor) for parameter in live.values()) != (shard is not None):
        raise ValueError(
            "model and shard disagree: expected a function that calls fully_shard for a sharded "
            "model, and none for one that is whole"
        )
    grown, mapper = _skeleton(model, plan), Mapper(plan, config)
    if shard:
        _without_weights(grown)
        shard(grown)
    there = set(plan.names(old))

    # experts lie in one parameter; two layers may make one
    @functools.lru_cache(maxsize=2)
    def whole_parameter(name: str) -> Tensor:
        found = live[name].detach()
        return found.full_tensor() if isinstance(found, DTensor) else found

    def make(whole: str) -> Tensor:
        return mapper.tensor(whole, lambda name: old[name].of(whole_parameter(old[name].name)))

    for name, parameter in list(grown.named_parameters(remove_duplicate=False)):
        whole = naming.wholes(name, parameter.shape)[0][0]
        if whole in there:
            terms = plan.sources(whole).terms
            kept = live[old[terms[0][0]].name].requires_grad if terms else True
            tensor = _placed(naming.build(name, parameter.shape, make), parameter)
            _set_parameter(grown, name, nn.Parameter(tensor, requires_grad=kept))
    if config.get("tie_word_embeddings"):
        grown.tie_weights()
    return grown.train(model.training)


def _placed(tensor: Tensor, like: nn.Parameter) -> Tensor:
    """Return the tensor, or this rank's shard where the parameter is sharded."""
    if not isinstance(like, DTensor):
        return tensor
    # all ranks have made the same tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _without_weights(model: "PreTrainedModel") -> None:
    for name, parameter in list(model.named_parameters()):
        _set_parameter(model, name, nn.Parameter(parameter.detach().to("meta")))
    if model.config.tie_word_embeddings:
        model.tie_weights()


def as_tied(table: Architecture, config: dict[str, Any], names: Container[str]) -> dict[str, Any]:
    """Return the config, tied only if no tied tensor stands under two names."""
    apart = any(sum(name in names for name in group) > 1 for group in table.tied)
    return config | ({"tie_word_embeddings": False} if apart else {})


def _skeleton(model: Model, plan: GrowthPlan) -> Model:
    """Return the grown model with buffers in place and weights that are still to be set."""
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(model.config)
    config.update(plan.config_changes(config.to_dict()))
    if config._attn_implementation == "apical":
        # use_kernels belongs to one instance: let transformers choose for the new one
        config._attn_implementation = None
    with no_init_weights():
        # in the model's own dtype: some families hold constants in buffers
        grown = type(model)._from_config(config)
    if model.can_generate():
        grown.generation_config = copy.deepcopy(model.generation_config)
    devices = {name: buffer.device for name, buffer in model.named_buffers()}
    for name, buffer in grown.named_buffers():
        buffer.data = buffer.to(devices[name])
    return grown


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)
