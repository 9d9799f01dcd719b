"""Tiles of matrix products in Triton: how they are compiled, placed and loaded."""

# what triton.jit makes of a function is not what a type checker reads
# pyright: reportArgumentType=false, reportOperatorIssue=false

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# row tiles that share their columns in the second-level cache
GROUP = tl.constexpr(8)


class Tiles(NamedTuple):
    """How a product is compiled: tiles, and how they are loaded."""

    # descriptors of the tensor memory accelerator, else pointers; None: the kernel has no choice
    tma: bool | None
    rows: int  # of a tile of the result
    columns: int
    depth: int  # of the blocks that are multiplied
    warps: int
    stages: int
    spills: int = 0

    @property
    def constants(self) -> dict[str, int | bool]:
        """What the kernel itself is told."""
        loads = {} if self.tma is None else {"TMA": self.tma}
        return {**loads, "BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth}


def fits_tma(x: Tensor) -> bool:
    """Return whether a descriptor can address x: rows are whole, at multiples of 16 bytes."""
    *steps, last = x.stride()
    places = [x.data_ptr(), *(step * x.element_size() for step in steps)]
    return last == 1 and steps[0] > 0 and not any(place % 16 for place in places)


@triton.jit
def place(i, rows, columns):
    """Return (row, column) of the i-th tile: GROUP rows at a time, rows fastest."""
    per_group = GROUP * columns
    first = i // per_group * GROUP
    size = tl.minimum(rows - first, GROUP)
    return first + i % per_group % size, i % per_group // size


@triton.jit
def matrix(
    ptr, rows, columns, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr
):
    """Return what `block_at` loads blocks of HEIGHT x WIDTH from: a descriptor, or the pointer."""
    if TMA:
        ptr = tl.make_tensor_descriptor(ptr, [rows, columns], [stride, 1], [HEIGHT, WIDTH])
    return ptr


@triton.jit
def block_at(
    x, row, column, rows, columns, stride,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return the block of a `matrix` that begins at (row, column), zeros past the matrix."""
    if TMA:
        block = x.load([row, column])
    else:
        o_rows, o_columns = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
        block = load_block(x, o_rows, rows, o_columns, columns, stride)
    return block


@triton.jit
def load_block(ptr, o_rows, rows, o_columns, columns, stride):
    """Return a block of a matrix, zeros past its last row and column."""
    m_block = (o_rows[:, None] < rows) & (o_columns[None, :] < columns)
    o_block = o_rows.to(tl.int64)[:, None] * stride + o_columns[None, :]
    return tl.load(ptr + o_block, mask=m_block, other=0.0)


@triton.jit
def store_block(ptr, block, o_rows, rows, o_columns, columns, stride):
    """Write a block of a matrix, nothing past its last row and column."""
    m_block = (o_rows[:, None] < rows) & (o_columns[None, :] < columns)
    o_block = o_rows.to(tl.int64)[:, None] * stride + o_columns[None, :]
    tl.store(ptr + o_block, block.to(ptr.dtype.element_ty), mask=m_block)
