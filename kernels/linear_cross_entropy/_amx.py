"""bfloat16 on the matrix unit of a CPU (AMX): the products, and the loss without the logits."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._common import native
from ._rules import Rules

# bytes of exponentials at a time, and the rows of a chunk: of more, the operands of the products
# leave the second cache (2 MB), fewer read and write the weights' gradient more often
_EXPONENTIAL_BYTES = 60e6
_ROWS = 512
_UNIT = 32  # the products' blocks

Keep = Callable[[Tensor, Sequence[Tensor]], None]


def supported() -> bool:
    """Return whether there is a matrix unit that we may use."""
    return native.loaded() and torch.ops.apical.amx_supported()


def suits(input: Tensor, linear_weight: Tensor) -> bool:  # noqa: A002
    """Return whether these operands are bfloat16 on a CPU with a matrix unit that we may use."""
    halves = input.dtype == linear_weight.dtype == torch.bfloat16
    return halves and input.device.type == "cpu" and supported()


class Products:
    """The operands stay bfloat16, and so is the gradient of the logits; all sums are float32."""

    dtype = torch.bfloat16

    def __init__(self, linear_weight: Tensor) -> None:
        self.weight = linear_weight.contiguous()  # (V, H)

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        torch.ops.apical.amx_product_nt(x, self.weight, out)
        return out

    def grad_input(self, grad: Tensor) -> Tensor:
        out = grad.new_empty(len(grad), self.weight.shape[1], dtype=torch.float32)
        torch.ops.apical.amx_product_nn(grad, self.weight, out)
        return out

    def add_grad_weight(self, grad: Tensor, x: Tensor, out: Tensor, first: bool) -> None:
        torch.ops.apical.amx_product_tn(grad, x, out, not first)


def fuses(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    ids: Tensor,
    rules: Rules,
) -> bool:
    """Return whether `sweep` does what is asked: one label, and logits that are scaled products."""
    plain = linear_bias is None and ids.shape[1] == 1 and not (rules.smoothing or rules.softcap)
    scaled = rules.logit_scale not in (0.0, float("inf"), float("-inf"))
    return plain and scaled and input.shape[1] > 0 and suits(input, linear_weight)


def sweep(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    labels: tuple[Tensor, Tensor, Tensor],
    active: Tensor,
    rules: Rules,
    grads: tuple[Tensor | None, Tensor | None],
    keep: Keep,
) -> tuple[list[Tensor], bool]:
    """Keep the values of the active rows, a chunk at a time, and leave or add their gradients.

    Shapes: labels are the targets (T,), their weights and those of the tokens; grads (T, H) of the
    input, which is only written at the rows, and (V, H) of the weight, which the first chunk
    overwrites; float32, None where not wanted.

    Returns the chunks that are left to do, whose logits are too far above their targets' or not
    finite, and whether the weight's gradient was written.
    """
    weight, (grad_input, grad_weight) = linear_weight.contiguous(), grads
    V, H = weight.shape
    exps, left, written = None, [], False
    for rows in _chunks(active, V, H, kept=grad_weight is not None):
        if grad_weight is not None and exps is None:
            exps = input.new_empty(_padded(len(rows)) * _padded(V))
        x = input[rows]
        to = None if grad_input is None else x.new_empty(x.shape, dtype=torch.float32)
        *values, usable = torch.ops.apical.amx_cross_entropy(
            x,
            weight,
            *(label[rows] for label in labels),
            rules.z_loss,
            rules.logit_scale,
            exps,
            to,
            grad_weight,
            written,
        )
        if not usable:
            left.append(rows)
            continue
        written = grad_weight is not None
        keep(rows, values)
        if grad_input is not None and to is not None:
            grad_input[rows] = to
    return left, written


def _padded(size: int) -> int:
    return -(-size // _UNIT) * _UNIT


def _chunks(rows: Tensor, V: int, H: int, kept: bool) -> Sequence[Tensor]:
    """Return the rows in chunks of equal size up to one, the largest first."""
    size = _ROWS
    if kept:
        # they may take what the gradient of the weights takes when it is rounded
        room = max(_EXPONENTIAL_BYTES, 2 * V * H) / (2 * _padded(V))
        size = min(max(int(room) // _UNIT * _UNIT, _UNIT), _ROWS)
    count = -(-len(rows) // size)
    return rows.tensor_split(count) if count else ()
