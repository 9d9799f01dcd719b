"""Products of bfloat16 operands with float32 sums on the matrix unit of a CPU (AMX)."""

import torch
from torch import Tensor

from .._common import native


def suits(input: Tensor, linear_weight: Tensor) -> bool:  # noqa: A002
    """Return whether these operands are bfloat16 on a CPU with a matrix unit that we may use."""
    halves = input.dtype == linear_weight.dtype == torch.bfloat16
    on_cpu = input.device.type == "cpu"
    return halves and on_cpu and native.loaded() and torch.ops.apical.amx_supported()


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
