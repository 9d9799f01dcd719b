"""The optimizer, with its moments by parameter name: to be saved, loaded and grown."""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..continual import Infinite, RewarmCosine, Schedule
from ..per_layer import PerLayerOptimizer
from ..sparse import replaced
from .eight_bit import adamw8bit
from .recipe.schema import Optimizer as OptimizerSpec
from .recipe.schema import Schedule as ScheduleSpec

Moments = dict[str, dict[str, Tensor]]


def build_optimizer(model: nn.Module, spec: OptimizerSpec, *, peak: float) -> Optimizer:
    """Return the recipe's AdamW, which decays matrices only, with its moments at zero."""
    parameters = list(model.parameters())
    matrices = {p for p in parameters if p.ndim >= 2} | _entries_of_matrices(model)
    groups = [
        {"params": [p for p in parameters if p in matrices], "weight_decay": spec.weight_decay},
        # gains and biases have a scale of their own that decay would pull away
        {"params": [p for p in parameters if p not in matrices], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    kinds = {"adamw": _adamw, "adamw8bit": adamw8bit}
    options = {"lr": peak, "betas": spec.betas, "eps": spec.eps}
    make = functools.partial(kinds[spec.kind], **options)
    return PerLayerOptimizer(groups, make) if spec.per_layer else make(groups)


def _entries_of_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Return what holds the weights of sparse layers, whatever its shape."""
    named = (item for layer in replaced(model).values() for item in layer.named_parameters())
    return {parameter for name, parameter in named if name != "bias"}


def _adamw(groups: list[dict[str, Any]], **options: Any) -> AdamW:
    optimizer = AdamW(groups, **options, fused=True)
    for parameter in (p for group in groups for p in group["params"]):
        # what torch would set at the first step: there is always a state to save and to load
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def norm_of_gradients(model: nn.Module, optimizer: Optimizer, *, clip: float | None) -> float:
    """Return the norm of all gradients of a step, and clip them to the given one."""
    if isinstance(optimizer, PerLayerOptimizer):
        return optimizer.pop_grad_norm().item()
    return nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).item()


def moments(model: nn.Module, optimizer: Optimizer) -> Moments:
    """Return the optimizer's live state by parameter name."""
    return {name: optimizer.state[p] for name, p in model.named_parameters()}


def set_moments(model: nn.Module, optimizer: Optimizer, values: Moments) -> None:
    """Copy the given state, by parameter name, into the optimizer."""
    for name, state in moments(model, optimizer).items():
        for key, tensor in state.items():
            tensor.copy_(values[name][key])


def build_schedule(spec: ScheduleSpec, *, steps: int) -> Schedule:
    """Return the schedule of a stage: the recipe's fractions of its number of steps."""
    warmup = round(spec.warmup * steps)
    if spec.kind == "cosine":
        return RewarmCosine(spec.peak, steps, warmup, spec.min_ratio)
    annealing = round(spec.anneal * steps)
    return Infinite(
        spec.peak,
        warmup_steps=warmup,
        # three roundings may add up to one step more than there is
        cooldown_steps=min(round(spec.cooldown * steps), steps - warmup - annealing),
        constant_ratio=spec.constant_ratio,
        min_ratio=spec.min_ratio,
        shape=spec.shape,
        timescale=spec.timescale,
        anneal_start=steps - annealing if annealing else None,
        anneal_steps=annealing or None,
    )
