"""The gradients from those of each token: blocks of classes, whose logits are computed again."""

import torch
from torch import Tensor

from . import _triton_launch as run
from . import _triton_launch_rows as by_row
from ._rules import Rules
from ._triton_launch import Case, case_of, padded

# bytes of a block's gradients, and the fewest classes that this may mean
_BLOCK_BYTES = 2**28
_BLOCK_CLASSES = 1024
# a block begins where a descriptor can, whatever the number of classes
_BLOCK_STEP = 256
# rows of an update of single labels, in float32
_UPDATE_ROWS = 2048


def backward(
    grads: tuple[Tensor, Tensor | None, Tensor | None],
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    ids: Tensor,
    id_weight: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    valid: Tensor,
    rules: Rules,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias; `grads` are those of loss, nll and lse."""
    (T, H), V = input.shape, len(linear_weight)
    new = input.new_empty if T else input.new_zeros
    grad_input = input.new_zeros((T, H) if wanted[0] else 0, dtype=torch.float32)
    grad_weight = new((V, H) if wanted[1] else 0, dtype=torch.float32)
    grad_bias = new(V if wanted[2] else 0, dtype=torch.float32)
    if not T or not any(wanted):
        return grad_input, grad_weight, grad_bias
    args = (input, linear_weight, linear_bias, ids, id_weight, class_weight)
    case = case_of(*args, grads[0], valid, rules)
    center, push, nll = _pushes(case, grads, lse, valid)
    rest = torch.zeros_like(push)
    width = min(V, max(_BLOCK_CLASSES, _BLOCK_BYTES // (len(push) * case.stored.itemsize)))
    width = padded(width, _BLOCK_STEP)
    buffer = input.new_empty(len(push), min(width, padded(V, 8)), dtype=case.stored)
    rows = slice(0, len(push))
    for first in range(0, V, width):
        part = case.smaller(first, width)
        e = buffer[:, : len(part.linear_weight)]
        rest += _block(part, rows, e, center, push, lse, first, case.share)
        block = slice(first, first + e.shape[1])
        if wanted[0]:
            run.input_gradient(part, rows, e, grad_input, add=first > 0)
        if wanted[1]:
            run.weight_gradient(part, rows, e, case.x, grad_weight[block], add=False)
        if wanted[2]:
            by_row.bias_gradient(part, rows, e, grad_bias[block], add=False)
    at_target = _at_target(case, center, push, nll, rest)
    _add_targets(case, at_target, (grad_input, grad_weight, grad_bias), wanted)
    return grad_input, grad_weight, grad_bias


def _pushes(
    case: Case, grads: tuple[Tensor, Tensor | None, Tensor | None], lse: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return lse, the factor of the softmax, and the gradient of nll, of each row (P,)."""
    zeros = torch.zeros_like(lse)
    nll, direct = (zeros if g is None else torch.where(valid, g, 0.0) for g in grads[1:])
    mass = case.id_weight.sum(1) + 2 * case.rules.z_loss * lse
    if case.rules.smoothing:
        classes = len(case.linear_weight) if case.class_weight is None else case.class_weight.sum()
        mass = mass + case.share * classes
    mass = torch.where(valid, mass, 0.0)
    push = case.token * mass[case.order] + (nll + direct)[case.order]
    return lse[case.order], push, nll[case.order]


def _block(
    part: Case,
    rows: slice,
    e: Tensor,
    center: Tensor,
    push: Tensor,
    lse: Tensor,
    first: int,
    share: float,
) -> Tensor:
    """Write a block's gradients of the logits but the targets'; return the sum of their softmax."""
    sums = e.new_zeros(1, run.pieces(part), len(push), dtype=torch.float32)
    more = {"offset": first, "share": share}
    run.exponentials_of(part, rows, e, center, sums, push=push, **more)
    if part.ids.shape[1] > 1:
        by_row.mend_labels(part, rows, e, lse, push, **more)
    return sums[0].sum(0)


def _at_target(case: Case, lse: Tensor, push: Tensor, nll: Tensor, rest: Tensor) -> Tensor:
    """Return the gradient of each row's target logit (P,), without the difference p - 1."""
    z, target, rules = case.logits[:, 0], case.target.long(), case.rules
    weights, labels = case.id_weight[case.order], case.ids[case.order]  # (P, K)
    pull = case.token * weights[:, 0] + nll
    value = (push - pull) * (z - lse).exp() - pull * rest
    same = (labels[:, 1:] == target[:, None]) * weights[:, 1:]
    value = value - case.token * same.sum(1)
    if rules.smoothing:
        u = 1.0 if case.class_weight is None else case.class_weight[target]
        value = value - case.token * case.share * u
    if rules.softcap:
        value = value * (1 - z / rules.softcap) * (1 + z / rules.softcap)
    here = torch.arange(len(value), device=value.device) < case.n_valid
    return torch.where(here, value * rules.logit_scale, 0.0)


def _add_targets(
    case: Case,
    value: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    wanted: tuple[bool, bool, bool],
) -> None:
    """Add the targets' part of all three gradients, in the order of the rows."""
    grad_input, grad_weight, grad_bias = grads
    target = case.target.long()
    # the rest of the last tile has no token of its own
    for first in range(0, len(grad_input) if wanted[0] else 0, _UPDATE_ROWS):
        rows = slice(first, min(first + _UPDATE_ROWS, len(grad_input)))
        own = value[rows, None] * case.linear_weight[target[rows]]
        grad_input[case.order[rows]] += own
    for first in range(0, len(value) if wanted[1] else 0, _UPDATE_ROWS):
        rows = slice(first, first + _UPDATE_ROWS)
        update = value[rows, None] * case.x[rows]
        grad_weight.index_put_((target[rows],), update, accumulate=True)
    if wanted[2]:
        grad_bias.index_put_((target,), value, accumulate=True)
