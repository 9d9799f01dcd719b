"""The loss on NVIDIA GPUs: which calls the Triton kernels take, and both passes."""

import functools
import importlib.util

import torch
from torch import Tensor


def takes(input: Tensor, linear_weight: Tensor) -> bool:  # noqa: A002
    """Return whether the kernels can compute this loss: both in one half precision, on a GPU."""
    half = input.dtype in (torch.bfloat16, torch.float16) and linear_weight.dtype == input.dtype
    return half and linear_weight.is_cuda and input.is_cuda and _runs_on(input.device)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the five vectors (T,) of the loss and three float32 gradients of its weighted sum."""
    from . import _triton_forward
    from ._rules import Rules

    rules = Rules(smoothing, z_loss, softcap, logit_scale)
    return _triton_forward.forward(
        input, linear_weight, linear_bias, ids, id_weight, class_weight, token_weight, rules,
        (input_grad, weight_grad, bias_grad),
    )  # fmt: skip


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

    rules = Rules(smoothing, z_loss, softcap, logit_scale)
    return _triton_backward.backward(
        (grad_loss, grad_nll, grad_lse), input, linear_weight, linear_bias, ids, id_weight,
        class_weight, lse, valid, rules, (input_grad, weight_grad, bias_grad),
    )  # fmt: skip


@functools.cache
def _runs_on(device: torch.device) -> bool:
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    # bfloat16 and asynchronous copies begin there
    return torch.cuda.get_device_capability(device) >= (8, 0)
