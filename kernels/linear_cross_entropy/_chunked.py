"""Chunks of rows: logits, softmax and the gradients of a chunk, before the next one starts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._common.labelled_rows import row_chunks
from . import _amx as amx
from . import _passes as passes
from ._passes import Labels, Upstream
from ._products import products_for
from ._rules import Rules

# a chunk's rows, its products, and where the gradient goes in half precision if it does
Pass = Callable[[Tensor, Tensor, Tensor | None], None]


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    input: bool
    weight: bool
    bias: bool


def forward(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    ids: Tensor,
    id_weight: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor,
    *numbers: Any,
) -> tuple[Tensor, ...]:
    """Return loss, nll, lse, entropy, correct (T,) and the gradients of the weighted loss."""
    rules, wanted = Rules(*numbers[:4]), Wanted(*numbers[4:])
    bias = None if linear_bias is None else linear_bias.float()
    values = no_values(token_weight)

    def softmax(rows: Tensor, logits: Tensor, half: Tensor | None) -> None:
        labels = Labels(ids[rows], id_weight[rows], class_weight)
        if any(wanted):
            found = passes.gradient_(logits, bias, labels, token_weight[rows], rules, half)
        else:
            found = passes.statistics_(logits, bias, labels, rules)
        keep(values, rows, found)

    active, grads = token_weight.nonzero().squeeze(1), None
    if amx.fuses(input, linear_weight, linear_bias, ids, rules):
        labels = (ids[:, 0], id_weight[:, 0], token_weight)

        def found(rows: Tensor, chunk: Sequence[Tensor]) -> None:
            keep(values, rows, chunk)

        active, grads = _without_logits(input, linear_weight, labels, active, rules, wanted, found)
    return *values, *sweep(input, linear_weight, ids[:, 0], active, wanted, softmax, grads=grads)


def _without_logits(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    labels: tuple[Tensor, Tensor, Tensor],
    active: Tensor,
    rules: Rules,
    wanted: Wanted,
    found: amx.Keep,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return the rows that need their logits, and the gradients of all others."""
    grads = _no_gradients(input, linear_weight, wanted, filled=not len(active))
    some = (grads[0] if wanted.input else None, grads[1] if wanted.weight else None)
    left, written = amx.sweep(input, linear_weight, labels, active, rules, some, found)
    if left and not written:
        grads[1].zero_()
    return torch.cat(left) if left else active[:0], grads


def backward(
    grad_loss: Tensor,
    grad_nll: Tensor | None,
    grad_lse: Tensor | None,
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    ids: Tensor,
    id_weight: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    valid: Tensor,
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients for upstream gradients of every token, from logits made again."""
    upstream = Upstream(grad_loss, grad_nll, grad_lse)
    rules, wanted = Rules(*numbers[:4]), Wanted(*numbers[4:])
    bias = None if linear_bias is None else linear_bias.float()

    def softmax(rows: Tensor, logits: Tensor, half: Tensor | None) -> None:
        labels = Labels(ids[rows], id_weight[rows], class_weight)
        passes.backward_(logits, bias, labels, at_rows(upstream, rows), lse[rows], rules, half)

    active = asked_for(upstream, valid)
    return sweep(input, linear_weight, ids[:, 0], active, wanted, softmax)


def sweep(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor,
    active: Tensor,
    wanted: Wanted,
    softmax: Pass,
    vocabulary: int | None = None,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the pass over the active rows, a chunk at a time; return the gradients it leaves.

    target (T,) may lie outside linear_weight, where that is a slice of the vocabulary.
    Gradients are float32, of shape (0,) where not wanted, or grads, to which they are added.
    Chunks are cut for so large a vocabulary, by default for linear_weight's.
    """
    V, fresh = linear_weight.shape[0], grads is None
    if grads is None:
        grads = _no_gradients(input, linear_weight, wanted, filled=not len(active))
    products = products_for(input, linear_weight, len(active))
    logits = half = None
    for rows in row_chunks(active, vocabulary or V):
        first, x = fresh and logits is None, input[rows].to(products.dtype)  # (C, H)
        if logits is None:
            logits = input.new_empty(len(rows), V, dtype=torch.float32)
            if any(wanted) and products.dtype != torch.float32:
                half = torch.empty_like(logits, dtype=products.dtype)
        raw = products.logits(x, logits[: len(rows)])  # (C, V)
        _exact_at_(raw, x, linear_weight, target[rows])
        grad = raw if half is None else half[: len(rows)]
        softmax(rows, raw, None if half is None else grad)
        if wanted.input:
            grads[0][rows] = products.grad_input(grad)
        if wanted.weight:
            products.add_grad_weight(grad, x, grads[1], first)
        if wanted.bias:
            grads[2].add_(grad.sum(0, dtype=torch.float32))
    return grads


def _exact_at_(logits: Tensor, x: Tensor, linear_weight: Tensor, target: Tensor) -> None:
    """Round the targets' products once: a loss of 1e-6 has the error of a logit of 30."""
    here = (target >= 0) & (target < len(linear_weight))
    column = torch.where(here, target, 0)[:, None]  # (C, 1)
    own = torch.linalg.vecdot(x.double(), linear_weight[column[:, 0]].double()).float()
    logits.scatter_(1, column, torch.where(here[:, None], own[:, None], logits.gather(1, column)))


def asked_for(upstream: Upstream, valid: Tensor) -> Tensor:
    """Return the valid rows that have a gradient other than 0."""
    some = torch.stack([grad != 0 for grad in upstream if grad is not None]).any(0)
    return (some & valid).nonzero().squeeze(1)


def at_rows(upstream: Upstream, rows: Tensor) -> Upstream:
    """Return the upstream gradients of these rows."""
    loss, nll, lse = (None if grad is None else grad[rows] for grad in upstream)
    assert loss is not None
    return Upstream(loss, nll, lse)


def keep(values: list[Tensor], rows: Tensor, found: Sequence[Tensor]) -> None:
    """Write a chunk's values to their rows."""
    for all_rows, chunk in zip(values, found, strict=True):
        all_rows[rows] = chunk


def no_values(like: Tensor) -> list[Tensor]:
    """Return loss, nll, lse, entropy and correct of tokens that are all left out."""
    return [torch.zeros_like(like) for _ in range(5)]


def _no_gradients(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    wanted: Wanted,
    filled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    V = linear_weight.shape[0]
    # the first chunk overwrites the weights' gradient, which saves filling it
    new = input.new_zeros if filled else input.new_empty
    return (
        input.new_zeros(input.shape if wanted.input else 0, dtype=torch.float32),
        new(linear_weight.shape if wanted.weight else 0, dtype=torch.float32),
        input.new_zeros(V if wanted.bias else 0, dtype=torch.float32),
    )
