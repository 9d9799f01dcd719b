"""The one autograd node of the product: the registered operation and its gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import ops


class _Monarch(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # noqa: A002
        first: Tensor,
        second: Tensor,
        bias: Tensor | None,
        keep: bool,
    ) -> Tensor:
        output, hidden = ops.forward(input, first, second, bias, keep)
        ctx.save_for_backward(input, first, second, hidden)
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:4])
        grads = ops.backward(grad_output, *ctx.saved_tensors, wanted)
        given = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return *given, None


def product(input: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
    """Return the product (T, n) of input, first, second and bias, differentiable once."""
    # the gradient of second alone reads what is between the factors
    keep = torch.is_grad_enabled() and second.requires_grad
    output = _Monarch.apply(input, first, second, bias, keep)
    assert isinstance(output, Tensor)
    return output
