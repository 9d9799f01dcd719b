"""Replaces the linear layers of a model, in place."""

import hashlib
import logging
from collections import Counter
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from ._dense import is_dense, weight_of
from ._reads import reader_of
from .files import write_entry
from .layers import StructuredLinear
from .layers._weight import pattern_of
from .rules import Rule

Model = TypeVar("Model", bound=nn.Module)
logger = logging.getLogger(__name__)


def sparsify(model: Model, rule: Rule) -> Model:
    """Replace linear layers of a model by what a rule says, in place, and return the model.

    Without `rule.include` these are all nn.Linear and transformers' Conv1D inside repeated blocks
    (an nn.ModuleList); never the output head. The new parameters have the dtype, device,
    `requires_grad` and training mode of the old ones; a layer that is used in several places is
    replaced in all of them. Call it before an optimizer, DDP or FSDP is given the parameters.

    If anything is refused, the model is as it was. What was replaced is logged, and
    `replaced(model)` finds it again. Experts that are one parameter of three axes are no linear
    layers: that they stay dense is a warning in the log, unless they are excluded.

    Args:
        model: any model; on the meta device too.
        rule: for example `apical.SparseLowRank(rank=0.25, density=0.03)`.

    Raises:
        ValueError: a pattern matches nothing, or a layer is already replaced, shares its weight
            with another module, has hooks, is sharded or quantized, is not finite, has a weight
            that the model computes with by itself where the rule makes a masked layer or one with
            an activation, or does not allow what the rule says (such as a rank above its size).

    Source: ours.
    """
    if not isinstance(rule, Rule):
        raise ValueError(
            f"rule is a {type(rule).__name__}; expected one such as apical.SparseLowRank()"
        )
    targets = _targets(model, rule)
    owners = _owners(model)
    for names, module in targets:
        _check(names[0], module, owners)
        _check_readers(model, names, _converted(names[0], _on_meta(module), rule))
    for names, module in targets:
        layer = _converted(names[0], module, rule)
        for name in names:
            model.set_submodule(name, layer)
    write_entry(model, replaced(model), rule)
    _report(model)
    _report_experts(model, rule)
    return model


def replaced(model: nn.Module) -> dict[str, StructuredLinear]:
    """Return the replaced layers of a model by their names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, StructuredLinear)}


def layer_seed(seed: int, name: str) -> int:
    """Return the seed of a layer, 0 .. 2^63 - 1: the same in every process and version."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _targets(model: nn.Module, rule: Rule) -> list[tuple[list[str], nn.Module]]:
    """Return the modules to replace, each with all its names."""
    linear = _linear_layers(model)
    every = [name for names, _ in linear for name in names]
    for pattern in rule.include or ():
        if not any(fnmatchcase(name, pattern) for name in every):
            raise ValueError(
                f"include has {pattern!r}, which matches no linear layer; {_known(every)}"
            )
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in rule.exclude:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ValueError(f"exclude has {pattern!r}, which matches no module; {_known(every)}")
    found = [(names, module) for names, module in linear if _meant(model, names, rule)]
    if not found:
        raise ValueError(
            f"no linear layer is in a repeated block and not excluded; {_known(every)}"
        )
    return found


def _linear_layers(model: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """Return the layers that a rule can mean, replaced ones too, each with all its names."""
    heads = _heads(model)
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and module not in heads and (is_dense(module) or _is_replaced(module)):
            found.setdefault(module, []).append(name)
    return [(names, module) for module, names in found.items()]


def _heads(model: nn.Module) -> set[nn.Module]:
    # of models inside the model too
    asked = [getattr(module, "get_output_embeddings", None) for module in model.modules()]
    return {ask() for ask in asked if ask is not None} - {None}


def _is_replaced(module: nn.Module) -> bool:
    return isinstance(module, StructuredLinear)


def _meant(model: nn.Module, names: list[str], rule: Rule) -> bool:
    if any(fnmatchcase(name, pattern) for name in names for pattern in rule.exclude):
        return False
    if rule.include is None:
        return any(_in_block(model, name) for name in names)
    return any(fnmatchcase(name, pattern) for name in names for pattern in rule.include)


def _in_block(model: nn.Module, name: str) -> bool:
    path = name.split(".")
    above = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path)))
    return any(isinstance(module, nn.ModuleList) for module in above)


def _owners(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return the names of the modules that hold each parameter, one for each module."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name)
    return owners


def _check(name: str, module: nn.Module, owners: dict[nn.Parameter, list[str]]) -> None:
    if _is_replaced(module):
        raise ValueError(
            f"{name} is already a {type(module).__name__}; exclude it, or start from a dense model"
        )
    for parameter in module.parameters():
        if type(parameter) is not nn.Parameter:
            raise ValueError(f"{name} has a {type(parameter).__name__} as a parameter; call "
                             "sparsify before the model is sharded or quantized")  # fmt: skip
        if len(owners[parameter]) > 1:
            raise ValueError(
                f"{name} shares its weight with {', '.join(set(owners[parameter]) - {name})}; "
                "exclude it, or untie them"
            )
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        raise ValueError(f"{name} has hooks, which would be lost; remove them, or exclude it")
    if not weight_of(module).is_meta and not weight_of(module).isfinite().all():
        raise ValueError(f"{name} has a weight with NaN or infinite entries; initialise it first")


def _check_readers(model: nn.Module, names: list[str], layer: StructuredLinear) -> None:
    for name in names:
        if not layer.readable and (reader := reader_of(model, name)):
            raise ValueError(
                f"{name} has a weight that {reader} computes with by itself, which a "
                f"{type(layer).__name__} cannot follow; pass exclude=({pattern_of(name)!r},)"
            )


def _on_meta(module: nn.Module) -> nn.Module:
    # nothing is allocated: what does not fit is found before anything is replaced
    weight = weight_of(module)
    rows, columns = weight.shape
    bias = module.bias is not None
    return nn.Linear(columns, rows, bias=bias, device="meta", dtype=weight.dtype)


def _converted(name: str, module: nn.Module, rule: Rule) -> StructuredLinear:
    try:
        layer = rule.convert(module, layer_seed(rule.seed, name))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    layer.path = name
    return layer


def _known(names: list[str]) -> str:
    if not names:
        return "the model has no nn.Linear or Conv1D but its output head"
    return f"its linear layers are {', '.join(_kinds(names))}"


def _kinds(names: list[str]) -> Counter[str]:
    """Return names with layer numbers as stars, each with how often it occurs."""
    return Counter(map(pattern_of, names))


def _report(model: nn.Module) -> None:
    layers = replaced(model)
    kinds = ", ".join(f"{name} ({count})" for name, count in _kinds([*layers]).items())
    stored = dense = 0
    for layer in layers.values():
        stored += sum(p.numel() for name, p in layer.named_parameters() if name != "bias")
        dense += layer.in_features * layer.out_features
    share = stored / dense
    logger.info("%d linear layers hold %.3f of their dense weights: %s", len(layers), share, kinds)


def _report_experts(model: nn.Module, rule: Rule) -> None:
    """Say which weights a rule may have meant that are in no layer of their own."""
    found = {
        f"{owner}.{name}": parameter.numel()
        for owner, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if _is_stack(parameter, module) and _meant(model, [owner, f"{owner}.{name}"], rule)
    }
    if found:
        logger.warning(
            "%d of %d parameters are matrices stacked in one tensor, such as experts, and stay "
            "dense: %s; exclude them to say so",
            *(sum(found.values()), sum(p.numel() for p in model.parameters())),
            ", ".join(f"{name} ({count})" for name, count in _kinds([*found]).items()),
        )


def _is_stack(parameter: nn.Parameter, module: nn.Module) -> bool:
    convolution = hasattr(module, "kernel_size")
    of_ours = _is_replaced(module)
    return parameter.ndim == 3 and min(parameter.shape) > 1 and not convolution and not of_ours
