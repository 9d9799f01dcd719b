"""Operator contracts of the loss: schemas, fake kernels, lazy dispatch, and the check of labels."""

import torch
from torch import Tensor

from .._common.autocast import outside_autocast

# tokens with weight 0 are left out: nll and lse 0, no gradient, and nothing of them is read.
# gradients are float32, of shape (0,) where not asked for.
torch.library.define(
    "apical::linear_cross_entropy_forward",
    "(Tensor input, Tensor linear_weight, Tensor target, Tensor token_weight, float z_loss, "
    "bool input_grad, bool weight_grad) "
    "-> (Tensor nll, Tensor lse, Tensor grad_input, Tensor grad_weight)",
)
torch.library.define(
    "apical::linear_cross_entropy_backward",
    "(Tensor token_weight, Tensor input, Tensor linear_weight, Tensor target, float z_loss, "
    "bool input_grad, bool weight_grad) -> (Tensor grad_input, Tensor grad_weight)",
)


def check_labels(target: Tensor, valid: Tensor, vocabulary: int) -> None:
    """Raise where a valid label is not in 0 .. V - 1; only on the CPU, elsewhere it would wait."""
    if target.device.type != "cpu":
        return
    wrong = target[valid & ((target < 0) | (target >= vocabulary))]
    if wrong.numel():
        raise ValueError(
            f"target holds the label {wrong[0].item()}, but linear_weight has V={vocabulary} rows; "
            f"expected 0 <= label < {vocabulary}, or ignore_index"
        )


@outside_autocast
def _forward(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    z_loss: float,
    input_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import _chunked as chunked

    check_labels(target, token_weight != 0, linear_weight.shape[0])
    return chunked.forward(
        input, linear_weight, target, token_weight, z_loss, input_grad, weight_grad
    )


@outside_autocast
def _backward(
    token_weight: Tensor,
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor,
    z_loss: float,
    input_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    from . import _chunked as chunked

    _, _, grad_input, grad_weight = chunked.forward(
        input, linear_weight, target, token_weight, z_loss, input_grad, weight_grad
    )
    return grad_input, grad_weight


for _device in ("CPU", "CUDA"):
    torch.library.impl("apical::linear_cross_entropy_forward", _device, _forward)
    torch.library.impl("apical::linear_cross_entropy_backward", _device, _backward)


def _fake_grads(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    input_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    return (
        input.new_empty(input.shape if input_grad else 0, dtype=torch.float32),
        input.new_empty(linear_weight.shape if weight_grad else 0, dtype=torch.float32),
    )


@torch.library.register_fake("apical::linear_cross_entropy_forward")
def _(input, linear_weight, target, token_weight, z_loss, input_grad, weight_grad):  # noqa: A002
    nll, lse = (input.new_empty(input.shape[0], dtype=torch.float32) for _ in range(2))
    return nll, lse, *_fake_grads(input, linear_weight, input_grad, weight_grad)


@torch.library.register_fake("apical::linear_cross_entropy_backward")
def _(token_weight, input, linear_weight, target, z_loss, input_grad, weight_grad):  # noqa: A002
    return _fake_grads(input, linear_weight, input_grad, weight_grad)


forward = torch.ops.apical.linear_cross_entropy_forward.default
backward = torch.ops.apical.linear_cross_entropy_backward.default
