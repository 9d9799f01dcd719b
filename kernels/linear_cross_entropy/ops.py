"""Operator contracts of the loss: schemas, fake kernels, lazy dispatch, and the check of labels."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._common.autocast import outside_autocast

_OPERANDS = "Tensor input, Tensor linear_weight, Tensor? linear_bias, "
_LABELS = "Tensor ids, Tensor id_weight, Tensor? class_weight, "
_RULES = (
    "float smoothing, float z_loss, float softcap, float logit_scale, "
    "bool input_grad, bool weight_grad, bool bias_grad"
)
_GRADIENTS = "Tensor grad_input, Tensor grad_weight, Tensor grad_bias"

# ids (T, K): the target first; tokens of weight 0 are left out, nothing of them is read. loss is
# without token_weight, the gradients are with it: float32, of shape (0,) where not asked for.
torch.library.define(
    "apical::linear_cross_entropy_forward",
    f"({_OPERANDS}{_LABELS}Tensor token_weight, {_RULES}) "
    f"-> (Tensor loss, Tensor nll, Tensor lse, Tensor entropy, Tensor correct, {_GRADIENTS})",
)
torch.library.define(
    "apical::linear_cross_entropy_backward",
    f"(Tensor grad_loss, Tensor? grad_nll, Tensor? grad_lse, {_OPERANDS}{_LABELS}"
    f"Tensor lse, Tensor valid, {_RULES}) -> ({_GRADIENTS})",
)


def check_labels(ids: Tensor, valid: Tensor, vocabulary: int) -> None:
    """Raise where a valid label is not in 0 .. V - 1; only on the CPU, elsewhere it would wait."""
    if ids.device.type != "cpu":
        return
    wrong = ((ids < 0) | (ids >= vocabulary)) & valid[:, None]
    if not wrong.any():
        return
    row, column = wrong.nonzero()[0].tolist()
    name = "soft_ids holds" if column else "target holds"
    raise ValueError(
        f"{name} the label {ids[row, column].item()}, but linear_weight has V={vocabulary} rows; "
        f"expected 0 <= label < {vocabulary}, or a target of ignore_index"
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
    *numbers: float,
) -> tuple[Tensor, ...]:
    check_labels(ids, token_weight != 0, linear_weight.shape[0])
    operands, labels = (input, linear_weight, linear_bias), (ids, id_weight, class_weight)
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
def _(input: Tensor, linear_weight: Tensor, *others: Any) -> tuple[Tensor, ...]:  # noqa: A002
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
