"""AdamW with its moments by parameter name, so that they can be saved, loaded and grown."""

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ..continual import Infinite, RewarmCosine, Schedule
from .recipe.schema import Optimizer as OptimizerSpec
from .recipe.schema import Schedule as ScheduleSpec

Moments = dict[str, dict[str, Tensor]]


def build_optimizer(model: nn.Module, spec: OptimizerSpec, *, peak: float) -> AdamW:
    """Return AdamW that decays matrices only, with its moments at zero."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": spec.weight_decay},
        # gains and biases have a scale of their own that decay would pull away
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = AdamW(groups, lr=peak, betas=spec.betas, eps=spec.eps, fused=True)
    for parameter in parameters:
        # what torch would set at the first step: there is always a state to save and to load
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def moments(model: nn.Module, optimizer: AdamW) -> Moments:
    """Return the optimizer's live state by parameter name."""
    return {name: optimizer.state[p] for name, p in model.named_parameters()}


def set_moments(model: nn.Module, optimizer: AdamW, values: Moments) -> None:
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
