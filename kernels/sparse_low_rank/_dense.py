"""The product on any device by torch alone: the weight is made for each pass, then multiplied."""

import torch
from torch import Tensor

from ._index import positions
from ._scaled import scaled

# the gradient of b comes from that of the whole weight
KEEPS_HIDDEN = False


def forward(
    input: Tensor,  # noqa: A002
    a: Tensor,
    b: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: list[Tensor],
    layout: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the product (T, n), and nothing to keep."""
    weight = _weight(a, b, values, positions(index, layout, len(values)), scale)
    return torch.nn.functional.linear(input, weight, bias), input.new_empty(0)


def backward(
    grad_output: Tensor,
    input: Tensor,  # noqa: A002
    a: Tensor,
    b: Tensor,
    values: Tensor,
    hidden: Tensor,
    index: list[Tensor],
    layout: list[int],
    scale: float,
    wanted: list[bool],
) -> list[Tensor]:
    """Return the gradients of input, a, b, values and bias, (0,) where not wanted."""
    del hidden
    stored = positions(index, layout, len(values))
    grads = [input.new_empty(0) for _ in wanted]
    if wanted[0]:
        grads[0] = grad_output @ _weight(a, b, values, stored, scale)
    if wanted[4]:
        grads[4] = grad_output.sum(0)
    if not any(wanted[1:4]):
        return grads
    of_weight = grad_output.t() @ input  # (n, m)
    if wanted[1]:
        grads[1] = scaled(b.t(), of_weight, scale)
    if wanted[2]:
        grads[2] = scaled(of_weight, a.t(), scale)
    if wanted[3]:
        grads[3] = of_weight.flatten()[stored]
    return grads


def _weight(a: Tensor, b: Tensor, values: Tensor, stored: Tensor, scale: float) -> Tensor:
    weight = scaled(b, a, scale)
    # positions are distinct: nothing is added twice, in any order
    flat = weight.view(-1)
    flat[stored] = flat[stored] + values
    return weight
