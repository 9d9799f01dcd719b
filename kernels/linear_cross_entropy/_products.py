"""The matrix products of a chunk of rows, and the choice of their implementation."""

from typing import Protocol

import torch
from torch import Tensor

from . import _amx as amx


class Products(Protocol):
    """What every implementation offers; rows and gradients of logits come in its dtype."""

    dtype: torch.dtype

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        """Write the products (C, V) of the rows x (C, H) into out, float32, and return it."""
        ...

    def grad_input(self, grad: Tensor) -> Tensor:
        """Return the float32 gradient (C, H) of the rows, of the gradient (C, V) of the logits."""
        ...

    def add_grad_weight(self, grad: Tensor, x: Tensor, out: Tensor, first: bool) -> None:
        """Add the gradient of the weights to out (V, H) float32; the first time overwrite it."""
        ...


class Float32Products:
    """Products of float32 operands; half precision is raised once per call, not per chunk."""

    dtype = torch.float32

    def __init__(self, linear_weight: Tensor) -> None:
        self.weight = linear_weight.float()  # (V, H)

    def logits(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.mm(x, self.weight.t(), out=out)

    def grad_input(self, grad: Tensor) -> Tensor:
        return grad @ self.weight

    def add_grad_weight(self, grad: Tensor, x: Tensor, out: Tensor, first: bool) -> None:
        out.addmm_(grad.t(), x, beta=0 if first else 1)


def products_for(input: Tensor, linear_weight: Tensor, rows: int) -> Products:  # noqa: A002
    """Return the products for so many rows of these operands."""
    if amx.suits(input, linear_weight):
        return amx.Products(linear_weight)
    return Float32Products(linear_weight)
