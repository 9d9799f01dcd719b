"""Operator contract of the loss: schema, fake kernel, lazy dispatch."""

import torch
from torch import Tensor

from .._common.autocast import outside_autocast
from .._common.labelled_rows import check_labels
from ._rules import Rules

# loss (not times the token's weight), nll, distance and lse are (T,). tokens with weight 0 are left
# out: their values are 0, no gradient, and nothing of them is read. the gradients are those of the
# weighted sum, in float32, of shape (0,) where not asked for.
torch.library.define(
    "apical::emo_loss_forward",
    "(Tensor input, Tensor linear_weight, Tensor cost_weight, Tensor target, Tensor token_weight, "
    "int mode, float clamp, bool exclude_own_mass, float z_loss, float softcap, "
    "float logit_scale, bool input_grad, bool weight_grad) "
    "-> (Tensor loss, Tensor nll, Tensor distance, Tensor lse, Tensor grad_input, "
    "Tensor grad_weight)",
)


@outside_autocast
def _forward(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    cost_weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    mode: int,
    clamp: float,
    exclude_own_mass: bool,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    input_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, ...]:
    from . import _chunked as chunked

    check_labels(target[:, None], token_weight != 0, linear_weight.shape[0])
    rules = Rules(mode, clamp, exclude_own_mass, z_loss, softcap, logit_scale)
    tensors = (input, linear_weight, cost_weight, target, token_weight)
    return chunked.forward(*tensors, rules, input_grad, weight_grad)


for _device in ("CPU", "CUDA"):
    torch.library.impl("apical::emo_loss_forward", _device, _forward)


@torch.library.register_fake("apical::emo_loss_forward")
def _(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    *options: object,
) -> tuple[Tensor, ...]:
    values = [input.new_empty(input.shape[0], dtype=torch.float32) for _ in range(4)]
    input_grad, weight_grad = options[-2:]
    grad_input = input.new_empty(input.shape if input_grad else 0, dtype=torch.float32)
    grad_weight = input.new_empty(linear_weight.shape if weight_grad else 0, dtype=torch.float32)
    return *values, grad_input, grad_weight


forward = torch.ops.apical.emo_loss_forward.default
