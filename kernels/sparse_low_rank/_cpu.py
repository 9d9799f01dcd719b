"""The product on the CPU: low-rank products by torch, the sparse ones by the C++ library in place.

Nothing of the size of the weight is made, and every pass over activations computes: the sparse part
is added where the low-rank part stands, the factor and the bias ride on a product.
"""

import torch
from torch import Tensor

from .._common import native
from ._index import GroupIndex, RowIndex
from ._scaled import scaled


def takes(input: Tensor, layout: list[int]) -> bool:  # noqa: A002
    """Return whether the tensors are on the CPU and the library has the products."""
    name = "blocks_sampled" if layout[0] else "sparse_sampled"
    return input.device.type == "cpu" and native.loaded() and hasattr(torch.ops.apical, name)


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
    """Return the product (T, n) and hidden (T, R)."""
    dtype, (x, a, b, values) = input.dtype, _computed(input, a, b, values)
    hidden = x @ a.t()
    output = scaled(hidden, b.t(), scale, None if bias is None else bias.to(x.dtype))
    _sparse(index, layout).add_(output, x, values)
    return output.to(dtype), hidden.to(dtype)


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
    grad, x, a, b, values, hidden = _computed(grad_output, input, a, b, values, hidden)
    sparse, dtype = _sparse(index, layout), input.dtype
    grads = [x.new_empty(0) for _ in wanted]
    of_hidden = scaled(grad, b, scale) if wanted[0] or wanted[1] else x  # (T, R)
    if wanted[0]:
        grads[0] = of_hidden @ a
        sparse.add_transposed_(grads[0], grad, values)
    if wanted[1]:
        grads[1] = of_hidden.t() @ x
    if wanted[2]:
        grads[2] = _of_factor(grad, hidden if hidden.ndim == 2 else x @ a.t(), scale)
    if wanted[3]:
        grads[3] = sparse.sampled(grad, x)
    if wanted[4]:
        grads[4] = grad.sum(0)
    return [part.to(dtype) for part in grads]


def _of_factor(grad: Tensor, hidden: Tensor, scale: float) -> Tensor:
    # (n, R). A transposed left matrix slows the product by up to a quarter (n = 2816); for many
    # tokens the other order wins even with the copy (2048 x 2816, R = 256: 24.3 to 21.1 ms)
    if len(hidden) < 8 * hidden.shape[1]:
        return scaled(grad.t(), hidden, scale)
    return scaled(hidden.t(), grad, scale).t().contiguous()


class _Rows:
    """Products with entries anywhere; activations are read where they are."""

    def __init__(self, index: list[Tensor]) -> None:
        self.index = RowIndex(*index)

    def add_(self, output: Tensor, x: Tensor, values: Tensor) -> None:
        """Add x S^T to output."""
        index = self.index
        torch.ops.apical.sparse_add_(output, x, values, index.row_starts, index.columns)

    def add_transposed_(self, of_input: Tensor, grad: Tensor, values: Tensor) -> None:
        """Add grad S to of_input."""
        index, by_column = self.index, values.index_select(0, self.index.order)
        torch.ops.apical.sparse_add_(of_input, grad, by_column, index.column_starts, index.rows)

    def sampled(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the entries of grad^T x that are stored."""
        return torch.ops.apical.sparse_sampled(grad, x, self.index.row_starts, self.index.columns)


class _Blocks:
    """The same with entries in blocks."""

    def __init__(self, index: list[Tensor], block: list[int]) -> None:
        found = GroupIndex(*index)
        self.where = (found.group_starts, found.chunks, *block)

    def add_(self, output: Tensor, x: Tensor, values: Tensor) -> None:
        torch.ops.apical.blocks_add_(output, x, values, *self.where)

    def add_transposed_(self, of_input: Tensor, grad: Tensor, values: Tensor) -> None:
        torch.ops.apical.blocks_add_transposed_(of_input, grad, values, *self.where)

    def sampled(self, grad: Tensor, x: Tensor) -> Tensor:
        return torch.ops.apical.blocks_sampled(grad, x, *self.where)


def _sparse(index: list[Tensor], layout: list[int]) -> _Rows | _Blocks:
    return _Blocks(index, layout[3:]) if layout[0] else _Rows(index)


def _computed(*tensors: Tensor) -> list[Tensor]:
    # torch's products of bfloat16 are slower than those of float32 where the unit is missing
    dtype = tensors[0].dtype
    halves = dtype == torch.bfloat16 and torch.ops.apical.amx_supported()
    # also for one column, of which contiguous() would keep the stride
    rows = [t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)
            for t in tensors]  # fmt: skip
    return rows if halves else [t.float() for t in rows]
