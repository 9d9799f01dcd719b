"""Sparse plus low-rank layers as others do them: from a dense weight, and with torch's CSR."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from apical.kernels.sparse_low_rank import Support


@dataclass(frozen=True)
class Csr:
    """Where a matrix of torch and its transpose have their entries."""

    rows: Tensor
    columns: Tensor
    transposed_rows: Tensor
    transposed_columns: Tensor
    permutation: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, support: Support, device: torch.device) -> "Csr":
        shape = (support.out_features, support.in_features)
        flat = support.flat(device).sort().values
        row, column = flat // shape[1], flat % shape[1]
        order = column.argsort(stable=True)
        starts = (_starts(row, shape[0]), _starts(column, shape[1]))
        return cls(starts[0], column, starts[1], row[order], order, shape)

    def matrix(self, values: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(self.rows, self.columns, values, self.shape)

    def transposed(self, values: Tensor) -> Tensor:
        parts = (self.transposed_rows, self.transposed_columns, values[self.permutation])
        return torch.sparse_csr_tensor(*parts, self.shape[::-1])


def _starts(index: Tensor, size: int) -> Tensor:
    counts = torch.bincount(index, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class Materialised(Function):
    """As SLTrain's code does it: the dense weight twice, and its whole gradient."""

    @staticmethod
    def forward(ctx: Any, input, a, b, values, flat, scale) -> Tensor:  # noqa: A002
        scaled, ctx.scale = a * scale, scale
        ctx.save_for_backward(input, scaled, b, values, flat)
        return F.linear(input, _weight(scaled, b, values, flat))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        input, scaled, b, values, flat = ctx.saved_tensors  # noqa: A001
        grad_input = grad @ _weight(scaled, b, values, flat)
        grad_weight = grad.t() @ input
        grad_a, grad_b = b.t() @ grad_weight * ctx.scale, grad_weight @ scaled.t()
        return grad_input, grad_a, grad_b, grad_weight.view(-1).gather(0, flat), None, None


def _weight(scaled: Tensor, b: Tensor, values: Tensor, flat: Tensor) -> Tensor:
    weight = b @ scaled
    weight.view(-1).scatter_add_(0, flat, values)
    return weight


class WithCsr(Function):
    """Low-rank products, and torch's sparse matrices for the rest."""

    @staticmethod
    def forward(ctx: Any, input, a, b, values, order, csr, scale) -> Tensor:  # noqa: A002
        hidden, values = input @ a.t(), values[order]
        ctx.save_for_backward(input, a, b, values, hidden, order)
        ctx.csr, ctx.scale = csr, scale
        return torch.addmm((csr.matrix(values) @ input.t()).t(), hidden, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        input, a, b, values, hidden, order = ctx.saved_tensors  # noqa: A001
        grad_hidden = grad @ b * ctx.scale
        sparse = (ctx.csr.transposed(values) @ grad.t()).t()
        zero = ctx.csr.matrix(torch.zeros_like(values))
        sampled = torch.sparse.sampled_addmm(zero, grad.t(), input, beta=0.0).values()
        grad_values = torch.empty_like(sampled)
        grad_values[order] = sampled
        grad_input = torch.addmm(sparse, grad_hidden, a)
        grad_b = grad.t() @ hidden * ctx.scale
        return grad_input, grad_hidden.t() @ input, grad_b, grad_values, None, None, None
