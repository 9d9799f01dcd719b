"""Tiles of matrix products in Triton: how they are compiled, placed and loaded."""

# what triton.jit makes of a function is not what a type checker reads
# pyright: reportArgumentType=false, reportOperatorIssue=false

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# row tiles that share their columns in the second-level cache
GROUP = tl.constexpr(8)


class Tiles(NamedTuple):
    """How a product is compiled: tiles, and how they are loaded."""

    tma: bool  # descriptors of the tensor memory accelerator, else pointers
    rows: int  # of a tile of the result
    columns: int
    depth: int  # of the blocks that are multiplied
    warps: int
    stages: int
    spills: int = 0

    @property
    def constants(self) -> dict[str, int | bool]:
        """What the kernel itself is told."""
        return {
            "TMA": self.tma,
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "BLOCK_K": self.depth,
        }

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def fits_tma(x: Tensor) -> bool:
    """Return whether a descriptor can address the matrix x: rows begin at multiples of 16 bytes."""
    row = x.stride(0) * x.element_size()
    return x.stride(1) == 1 and row > 0 and not (row % 16 or x.data_ptr() % 16)


@triton.jit
def place(i, rows, columns):
    """Return (row, column) of the i-th tile: GROUP rows at a time, rows fastest."""
    per_group = GROUP * columns
    first = i // per_group * GROUP
    size = tl.minimum(rows - first, GROUP)
    return first + i % per_group % size, i % per_group // size


@triton.jit
def load_block(ptr, o_rows, rows, o_columns, columns, stride):
    """Return a block of a matrix, zeros past its last row and column."""
    m_block = (o_rows[:, None] < rows) & (o_columns[None, :] < columns)
    o_block = o_rows.to(tl.int64)[:, None] * stride + o_columns[None, :]
    return tl.load(ptr + o_block, mask=m_block, other=0.0)
