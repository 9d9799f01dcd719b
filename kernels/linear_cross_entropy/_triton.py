"""The loss on NVIDIA GPUs: which calls the Triton kernels take, and both passes."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._common.triton_device import runs_triton


def takes(input: Tensor, linear_weight: Tensor) -> bool:  # noqa: A002
    """Return whether the kernels can compute this loss: both in one half precision, on a GPU."""
    half = input.dtype in (torch.bfloat16, torch.float16) and linear_weight.dtype == input.dtype
    return half and linear_weight.is_cuda and runs_triton(input.device)


def forward(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    ids: Tensor,
    id_weight: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor,
    smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    *,
    filtered: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the five vectors (T,) of the loss and three float32 gradients of its weighted sum.

    With `filtered`, tiles of next to nothing stay out of the gradients of input and weight.
    """
    from . import _triton_forward
    from ._rules import Rules

    rules, H = Rules(smoothing, z_loss, softcap, logit_scale), input.shape[1]
    *values, grad_input, grad_weight, grad_bias = _triton_forward.forward(
        *_widened(input, linear_weight), linear_bias, ids, id_weight, class_weight, token_weight,
        rules, (input_grad, weight_grad, bias_grad), filtered=filtered,
    )  # fmt: skip
    loss, nll, lse, entropy, correct = values
    grads = _narrowed(grad_input, H), _narrowed(grad_weight, H), grad_bias
    return loss, nll, lse, entropy, correct, *grads


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
    smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the float32 gradients of input, weight and bias from those of each token."""
    from . import _triton_backward
    from ._rules import Rules

    rules, H = Rules(smoothing, z_loss, softcap, logit_scale), input.shape[1]
    grad_input, grad_weight, grad_bias = _triton_backward.backward(
        (grad_loss, grad_nll, grad_lse), *_widened(input, linear_weight), linear_bias, ids,
        id_weight, class_weight, lse, valid, rules, (input_grad, weight_grad, bias_grad),
    )  # fmt: skip
    return _narrowed(grad_input, H), _narrowed(grad_weight, H), grad_bias


def _widened(input: Tensor, linear_weight: Tensor) -> tuple[Tensor, Tensor]:  # noqa: A002
    """Return both with zeros up to a multiple of 16 columns: rows begin where wide loads can."""
    missing = -input.shape[1] % 16
    if not missing:
        return input, linear_weight
    return pad(input, (0, missing)), pad(linear_weight, (0, missing))


def _narrowed(grad: Tensor, H: int) -> Tensor:
    return grad if grad.ndim < 2 or grad.shape[1] == H else grad[:, :H].contiguous()
