"""Merging models or state dicts in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from .checks import Described, check_configs, check_tensors
from .methods import Method
from .soup import GreedySoup, resolve
from .sums import combine

Model = TypeVar("Model", bound=nn.Module | Mapping[str, Tensor])


def merge(models: Sequence[Model], method: Method | GreedySoup) -> Model:
    """Return a new model, or state dict, that is the models merged.

    Models have one class and, of transformers models, one config; dtypes, devices, tied weights,
    `requires_grad` and everything but the weights are those of the first one. Nothing is shared
    with them and they stay as they are. Tensors of integers and buffers are not merged: they must
    be equal. Memory: the result, and one more tensor.

    Precision: sums in float32, or in float64 where a tensor is, rounded once.

    Args:
        models: modules, or state dicts; of TaskVectors the first is the base, of EMA the last is
            the newest.
        method: for example `apical.Average()`.

    Raises:
        ValueError: models are of different architectures, or the method has numbers for more or
            fewer models.

    Source: ours; the methods name theirs.
    """
    if not models:
        raise ValueError("models is empty; expected one model or more")
    _check(models)
    merged: Any = _dicts if isinstance(models[0], Mapping) else _modules

    def average(some: tuple[int, ...]) -> AbstractContextManager[Any]:
        shares = [(i in some) / len(some) for i in range(len(models))]
        return nullcontext(merged(models, shares))

    return merged(models, resolve(method, models, average))


def _check(models: Sequence[nn.Module | Mapping[str, Tensor]]) -> None:
    labels = [f"models[{i}]" for i in range(len(models))]
    for label, model in zip(labels, models, strict=True):
        if not isinstance(model, nn.Module | Mapping):
            raise ValueError(f"{label} is a {type(model).__name__}; expected a model or state dict")
        if _kind(model) != _kind(models[0]):
            kinds = f"a {type(model).__name__} and models[0] a {type(models[0]).__name__}"
            raise ValueError(f"{label} is {kinds}; expected one class")
    configs: list[Any] = [getattr(model, "config", None) for model in models]
    if all(hasattr(config, "to_dict") for config in configs):
        check_configs(labels, [config.to_dict() for config in configs])
    check_tensors(labels, [_described(model) for model in models])
    for label, model in zip(labels, models, strict=True):
        if isinstance(model, nn.Module):
            _check_buffers(label, model, cast(nn.Module, models[0]))


def _kind(model: object) -> type:
    return Mapping if isinstance(model, Mapping) else type(model)


def _described(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Described]:
    return {
        name: Described(tuple(t.shape), t.dtype, _reader(t)) for name, t in _weights(model).items()
    }


def _weights(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    # named_parameters gives tied ones once, by their first name
    return dict(model.named_parameters() if isinstance(model, nn.Module) else model)


def _reader(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor.detach()


def _check_buffers(label: str, model: nn.Module, first: nn.Module) -> None:
    here, there = dict(first.named_buffers()), dict(model.named_buffers())
    for name in sorted({*here, *there}):
        one, other = here.get(name), there.get(name)
        same = one is not None and other is not None and one.shape == other.shape
        if not same or not bool((cast(Tensor, one) == cast(Tensor, other).to(one)).all()):
            raise ValueError(
                f"{name} is a buffer and not the same in {label} and models[0]; expected equal "
                "ones: copy one over the other, or merge state dicts"
            )


def _dicts(models: Sequence[Mapping[str, Tensor]], c: Sequence[float]) -> dict[str, Tensor]:
    return {name: _combined(models, name, c) for name in models[0]}


def _modules(models: Sequence[nn.Module], c: Sequence[float]) -> nn.Module:
    weights = [_weights(model) for model in models]
    made: dict[int, Any] = {}
    for name, old in models[0].named_parameters():
        made[id(old)] = nn.Parameter(_combined(weights, name, c), requires_grad=old.requires_grad)
    # what deepcopy has in its memo it takes as copied: ties hold and no old weight is copied
    return copy.deepcopy(models[0], made)


def _combined(models: Sequence[Mapping[str, Tensor]], name: str, c: Sequence[float]) -> Tensor:
    if not models[0][name].dtype.is_floating_point:
        return models[0][name].detach().clone()
    return combine([_reader(model[name]) for model in models], c)
