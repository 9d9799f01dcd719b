"""Operator contracts of the statistics: schemas, fake kernels, lazy dispatch."""

import torch
from torch import Tensor

from .._common.autocast import outside_autocast
from .._common.labelled_rows import check_labels

# statistics (3, T) and centre (H,) are float64, 0 for tokens that are not valid, of which nothing
# is read; pull (T, H) and gradients are float32, of shape (0,) where not asked for.
torch.library.define(
    "apical::spherical_statistics_forward",
    "(Tensor input, Tensor linear_weight, Tensor target, Tensor valid, bool input_grad) "
    "-> (Tensor statistics, Tensor centre, Tensor pull)",
)
torch.library.define(
    "apical::spherical_statistics_backward",
    "(Tensor grads, Tensor input, Tensor linear_weight, Tensor target, Tensor valid, "
    "Tensor centre, Tensor pull, bool input_grad, bool weight_grad) "
    "-> (Tensor grad_input, Tensor grad_weight)",
)


@outside_autocast
def _forward(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor,
    valid: Tensor,
    input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import _moments as moments

    check_labels(target[:, None], valid, linear_weight.shape[0])
    return moments.forward(input, linear_weight, target, valid, input_grad)


@outside_autocast
def _backward(
    grads: Tensor,
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor,
    valid: Tensor,
    centre: Tensor,
    pull: Tensor,
    input_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    from . import _moments as moments

    tensors = (grads, input, linear_weight, target, valid, centre, pull)
    return moments.backward(*tensors, input_grad, weight_grad)


for _device in ("CPU", "CUDA"):
    torch.library.impl("apical::spherical_statistics_forward", _device, _forward)
    torch.library.impl("apical::spherical_statistics_backward", _device, _backward)


@torch.library.register_fake("apical::spherical_statistics_forward")
def _(input, linear_weight, target, valid, input_grad):  # noqa: A002
    T, H = input.shape
    statistics = input.new_empty(3, T, dtype=torch.float64)
    pull = input.new_empty((T, H) if input_grad else 0, dtype=torch.float32)
    return statistics, input.new_empty(H, dtype=torch.float64), pull


@torch.library.register_fake("apical::spherical_statistics_backward")
def _(grads, input, linear_weight, target, valid, centre, pull, input_grad, weight_grad):  # noqa: A002
    return (
        input.new_empty(input.shape if input_grad else 0, dtype=torch.float32),
        input.new_empty(linear_weight.shape if weight_grad else 0, dtype=torch.float32),
    )


forward = torch.ops.apical.spherical_statistics_forward.default
backward = torch.ops.apical.spherical_statistics_backward.default
