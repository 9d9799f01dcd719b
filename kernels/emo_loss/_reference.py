"""The definition, in plain PyTorch: any device, float32 and above."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ._rules import Rules, coefficients


def forward(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    cost_weight: Tensor,
    target: Tensor,
    valid: Tensor,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, nll, distance and lse (T,), 0 where not valid."""
    # valid rows alone: 0 * NaN of an ignored row would reach the gradient of linear_weight
    rows = valid.nonzero().squeeze(1)  # (N,)
    nll, distance, lse = parts(input[rows], linear_weight, cost_weight, target[rows], rules)
    value = distance
    if rules.exclude_own_mass:
        value = distance + (-nll).exp().detach()
    of_nll, of_distance = coefficients(nll, value, rules)
    loss = of_nll * nll + of_distance * value + rules.z_loss * lse.square()
    zeros = loss.new_zeros(valid.shape)
    return tuple(zeros.index_put((rows,), part) for part in (loss, nll, value, lse))  # pyright: ignore[reportReturnType]


def parts(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    cost_weight: Tensor,
    target: Tensor,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return nll, distance (own mass counted) and lse (T,), differentiable twice."""
    dtypes = (input.dtype, linear_weight.dtype, torch.float32)
    dtype = functools.reduce(torch.promote_types, dtypes)
    logits = rules.logit_scale * F.linear(input.to(dtype), linear_weight.to(dtype))  # (T, V)
    if rules.softcap:
        logits = rules.softcap * (logits / rules.softcap).tanh()
    directions = F.normalize(cost_weight.detach().to(dtype), dim=1)  # (V, D)
    cost = (1 - directions[target] @ directions.t()).clamp(min=0)  # (T, V)
    cost = cost.scatter(1, target[:, None], 0.0)
    nll = F.cross_entropy(logits, target, reduction="none")
    return nll, (logits.softmax(1) * cost).sum(1), logits.logsumexp(1)
