"""Chunks of rows: logits, cosines, softmax and both gradients of a chunk, then the next one."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._common.labelled_rows import row_chunks
from ._rules import Rules, coefficients


class _Softmax(NamedTuple):
    """Statistics of a chunk's rows, (C,) in float64, from which the target is kept apart."""

    rest: Tensor  # sum of exp(logits - max) without the target
    own: Tensor  # the target's exponential
    nll: Tensor
    lse: Tensor

    @property
    def total(self) -> Tensor:
        return self.rest + self.own


def forward(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    cost_weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    rules: Rules,
    input_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, ...]:
    """Return loss, nll, distance, lse (T,), and the gradients of the weighted loss."""
    T, H = input.shape
    V = linear_weight.shape[0]
    active = token_weight.nonzero().squeeze(1)
    values = [input.new_zeros(T, dtype=torch.float32) for _ in range(4)]
    grad_input = input.new_zeros((T, H) if input_grad else 0, dtype=torch.float32)
    # the first chunk overwrites it, which saves filling it
    new = input.new_empty if len(active) else input.new_zeros
    grad_weight = new((V, H) if weight_grad else 0, dtype=torch.float32)
    # once per call, not once per chunk
    W, directions = linear_weight.float(), F.normalize(cost_weight.float(), dim=1)
    buffers = None
    for rows in row_chunks(active, V):
        x, y = input[rows].float() * rules.logit_scale, target[rows]  # (C, H), (C,)
        first = buffers is None
        buffers = x.new_empty(2, len(rows), V) if buffers is None else buffers
        logits = torch.mm(x, W.t(), out=buffers[0, : len(rows)])  # (C, V)
        cosines = torch.mm(directions[y], directions.t(), out=buffers[1, : len(rows)])
        wanted = input_grad or weight_grad
        found = _rows_(logits, cosines, y, token_weight[rows], rules, wanted)
        for all_rows, chunk in zip(values, found, strict=True):
            all_rows[rows] = chunk.float()
        if input_grad:
            grad_input[rows] = (logits @ W).mul_(rules.logit_scale)
        if weight_grad:
            grad_weight.addmm_(logits.t(), x, beta=0 if first else 1)
    return *values, grad_input, grad_weight


def _rows_(
    logits: Tensor, cosines: Tensor, target: Tensor, scale: Tensor, rules: Rules, wanted: bool
) -> tuple[Tensor, ...]:
    """Turn products into scale x d loss / d products, if wanted; return the four values (4, C)."""
    slope = _cap_(logits, rules.softcap, wanted)
    s = _softmax_(logits, target)
    near = cosines.mul_(logits)
    # the target's exponential is 0 here, and its cost too; rounding must not make it negative
    distance = (s.rest - near.sum(1).double()).clamp(min=0) / s.total
    value = distance + s.own / s.total if rules.exclude_own_mass else distance
    of_nll, of_distance = coefficients(s.nll, value, rules)
    if wanted:
        pull = 2 * rules.z_loss * s.lse - of_distance * distance
        logits.mul_(_column((of_nll + pull + of_distance) * scale / s.total))
        logits.addcmul_(near, _column(-of_distance * scale / s.total))
        # p - 1 = -rest / total: nothing cancels where the target is almost certain
        at_target = (pull * s.own - of_nll * s.rest) * scale / s.total
        logits.scatter_(1, target[:, None], _column(at_target))
        if slope is not None:
            logits.mul_(slope)
    loss = of_nll * s.nll + of_distance * value + rules.z_loss * s.lse.square()
    return loss, s.nll, value, s.lse


def _column(values: Tensor) -> Tensor:
    return values.float()[:, None]


def _cap_(logits: Tensor, softcap: float, wanted: bool) -> Tensor | None:
    """Cap the logits; return the derivative of that, if there is a cap and it is wanted."""
    if not softcap:
        return None
    bent = logits.div_(softcap).tanh_()
    slope = 1 - bent.square() if wanted else None
    logits.mul_(softcap)
    return slope


def _softmax_(logits: Tensor, target: Tensor) -> _Softmax:
    """Turn logits into exp(logits - max), 0 at the target."""
    column = target[:, None]
    logit = logits.gather(1, column)  # (C, 1)
    logits.scatter_(1, column, float("-inf"))
    top = torch.maximum(logits.amax(1, keepdim=True), logit)
    rest = logits.sub_(top).exp_().sum(1).double()
    below = (logit.double() - top).squeeze(1)
    own = below.exp()
    log_sum = torch.log1p(rest + (own - 1))
    return _Softmax(rest, own, log_sum - below, top.squeeze(1) + log_sum)
