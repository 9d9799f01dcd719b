"""Operator contracts of the loss: schemas, fake kernels, lazy dispatch."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._common.autocast import outside_autocast
from .._common.labelled_rows import check_labels

_OPERANDS = "Tensor input, Tensor linear_weight, Tensor? linear_bias, "
_LABELS = "Tensor ids, Tensor id_weight, Tensor? class_weight, "
_RULES = (
    "float smoothing, float z_loss, float softcap, float logit_scale, "
    "bool input_grad, bool weight_grad, bool bias_grad"
)
_GRADIENTS = "Tensor grad_input, Tensor grad_weight, Tensor grad_bias"

# ids (T, K): the target first; tokens of weight 0 are left out, nothing of them is read. loss is
# without token_weight, the gradients are with it: float32, of shape (0,) where not asked for.
# filtered allows gradients without tiles of next to nothing.
torch.library.define(
    "apical::linear_cross_entropy_forward",
    f"({_OPERANDS}{_LABELS}Tensor token_weight, {_RULES}, *, bool filtered=False) "
    f"-> (Tensor loss, Tensor nll, Tensor lse, Tensor entropy, Tensor correct, {_GRADIENTS})",
)
torch.library.define(
    "apical::linear_cross_entropy_backward",
    f"(Tensor grad_loss, Tensor? grad_nll, Tensor? grad_lse, {_OPERANDS}{_LABELS}"
    f"Tensor lse, Tensor valid, {_RULES}) -> ({_GRADIENTS})",
)


def _backend(input: Tensor, linear_weight: Tensor) -> ModuleType:  # noqa: A002
    from . import _chunked as chunked
    from . import _triton as compiled

    return compiled if compiled.takes(input, linear_weight) else chunked


@outside_autocast
def _forward(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    ids: Tensor,
    id_weight: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor,
    *numbers: Any,
    filtered: bool = False,
) -> tuple[Tensor, ...]:
    check_labels(ids, token_weight != 0, linear_weight.shape[0])
    operands, labels = (input, linear_weight, linear_bias), (ids, id_weight, class_weight)
    if filtered:
        from . import _triton as compiled

        # chunks of rows skip nothing: their products are torch's
        if compiled.takes(input, linear_weight):
            return compiled.forward(*operands, *labels, token_weight, *numbers, filtered=True)
    return _backend(input, linear_weight).forward(*operands, *labels, token_weight, *numbers)


@outside_autocast
def _backward(
    grad_loss: Tensor,
    grad_nll: Tensor | None,
    grad_lse: Tensor | None,
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    backend, upstream = _backend(input, linear_weight), (grad_loss, grad_nll, grad_lse)
    return backend.backward(*upstream, input, linear_weight, *others)


for _device in ("CPU", "CUDA"):
    torch.library.impl("apical::linear_cross_entropy_forward", _device, _forward)
    torch.library.impl("apical::linear_cross_entropy_backward", _device, _backward)


def _fake_grads(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (
        input.shape if input_grad else 0,
        linear_weight.shape if weight_grad else 0,
        linear_weight.shape[0] if bias_grad else 0,
    )
    new = [input.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return new[0], new[1], new[2]


@torch.library.register_fake("apical::linear_cross_entropy_forward")
def _(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    *others: Any,
    filtered: bool = False,
) -> tuple[Tensor, ...]:
    values = [input.new_empty(input.shape[0], dtype=torch.float32) for _ in range(5)]
    return *values, *_fake_grads(input, linear_weight, *others[-3:])


@torch.library.register_fake("apical::linear_cross_entropy_backward")
def _(
    grad_loss: Tensor,
    grad_nll: Tensor | None,
    grad_lse: Tensor | None,
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_grads(input, linear_weight, *others[-3:])


forward = torch.ops.apical.linear_cross_entropy_forward.default
backward = torch.ops.apical.linear_cross_entropy_backward.default
