"""Contracts of the product: schemas, fake kernels, lazy dispatch."""

from types import ModuleType

import torch
from torch import Tensor

from .._common.autocast import outside_autocast

_OPERANDS = "Tensor input, Tensor first, Tensor second"

# input (T, m), first (r, j k, s), second (k, p, r j). hidden (T, r j k) is what is between them, in
# an order of the implementation's own; (0,) unless it is to be kept, for the gradient of second. a
# gradient that is not wanted is (0,); wanted: input, first, second, bias
torch.library.define(
    "apical::monarch_forward",
    f"({_OPERANDS}, Tensor? bias, bool keep) -> (Tensor output, Tensor hidden)",
)
torch.library.define(
    "apical::monarch_backward",
    f"(Tensor grad_output, {_OPERANDS}, Tensor hidden, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)

Grads = tuple[Tensor, Tensor, Tensor, Tensor]


def implementation(input: Tensor) -> ModuleType:  # noqa: A002
    """Return the fastest implementation that takes this call."""
    if input.is_cuda:
        from . import _triton

        if _triton.takes(input):
            return _triton
    from . import _cpu, _regrouped

    return _regrouped if _regrouped.takes(input) else _cpu


@outside_autocast
def _forward(
    input: Tensor,  # noqa: A002
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return implementation(input).forward(input, first, second, bias, keep)


@outside_autocast
def _backward(
    grad_output: Tensor,
    input: Tensor,  # noqa: A002
    first: Tensor,
    second: Tensor,
    hidden: Tensor,
    wanted: list[bool],
) -> Grads:
    grads = implementation(input).backward(grad_output, input, first, second, hidden, wanted)
    return grads[0], grads[1], grads[2], grads[3]


torch.library.impl("apical::monarch_forward", "CompositeExplicitAutograd", _forward)
torch.library.impl("apical::monarch_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("apical::monarch_forward")
def _(
    input: Tensor,  # noqa: A002
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    T, n, between = input.shape[0], second.shape[0] * second.shape[1], first.shape[:2].numel()
    return input.new_empty(T, n), input.new_empty((T, between) if keep else (0,))


@torch.library.register_fake("apical::monarch_backward")
def _(
    grad_output: Tensor,
    input: Tensor,  # noqa: A002
    first: Tensor,
    second: Tensor,
    hidden: Tensor,
    wanted: list[bool],
) -> Grads:
    shapes = (input.shape, first.shape, second.shape, grad_output.shape[1:])
    new = [input.new_empty(s if w else (0,)) for s, w in zip(shapes, wanted, strict=True)]
    return new[0], new[1], new[2], new[3]


forward = torch.ops.apical.monarch_forward.default
backward = torch.ops.apical.monarch_backward.default
