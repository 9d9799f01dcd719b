"""What the Triton kernels of blocks share: configurations, tiles, blocks, the low-rank product."""

# what triton.jit makes of a function is not what a type checker reads
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# row tiles that share their columns in the second-level cache
GROUP = tl.constexpr(8)


class Configuration(NamedTuple):
    """How a kernel is compiled: tiles, and how they are loaded."""

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


def configurations(
    major: int, itemsize: int, *, tma: bool, few: bool, columns: int, depth: int
) -> list[Configuration]:
    """Return the ways to compile a product, the best first; all cut the result alike.

    Args:
        major: of the compute capability.
        itemsize: bytes of an element; 4 are multiplied without tensor cores.
        tma: whether descriptors can address the matrices.
        few: whether large tiles would leave multiprocessors idle.
        columns: what the columns of a tile must divide.
        depth: likewise.
    """
    if itemsize == 4:
        fits = math.gcd(columns, 64), math.gcd(depth, 16)
        # with four warps a thread has more to do between loads, if its addresses leave registers
        return [Configuration(False, 64, *fits, warps, 3) for warps in (4, 8)]
    if major < 9 or not tma:
        fits = math.gcd(columns, 128), math.gcd(depth, 32)
        return [Configuration(False, 128, *fits, 8, stages) for stages in (4, 3, 2)]
    fits = math.gcd(columns, 128), math.gcd(depth, 64)
    # one block of 256 rows on a multiprocessor, or two of 128
    rows, many = (128, (3, 2)) if few else (256, (4, 3))
    return [Configuration(True, rows, *fits, 8, stages) for stages in many]


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


@triton.jit
def height_of(group, N, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """Return the rows of a group: those of a block, fewer in the last."""
    height = tl.minimum(N - group * ROWS, ROWS)
    if EVEN:
        # values of a column are loaded 16 bytes at a time
        height = tl.multiple_of(height, 16)
    return height


@triton.jit
def columns_of(chunks_ptr, o_k, m_k, COLUMNS: tl.constexpr, RUN: tl.constexpr):
    """Return the columns of the matrix that the columns o_k of a group's blocks are."""
    chunk = tl.load(chunks_ptr + o_k // COLUMNS, mask=m_k, other=0)
    # RUN of them follow one another, which the compiler cannot see through the list
    return tl.max_contiguous(tl.multiple_of(chunk * COLUMNS + o_k % COLUMNS, RUN), RUN)
