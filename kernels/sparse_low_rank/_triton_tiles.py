"""What the Triton kernels of blocks share: configurations, and where a group's entries lie."""

# what triton.jit makes of a function is not what a type checker reads
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import math

import triton
import triton.language as tl

from .._common.triton_tiles import Tiles


def configurations(
    major: int, itemsize: int, *, tma: bool, few: bool, columns: int, depth: int
) -> list[Tiles]:
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
        return [Tiles(False, 64, *fits, warps, 3) for warps in (4, 8)]
    if major < 9 or not tma:
        fits = math.gcd(columns, 128), math.gcd(depth, 32)
        return [Tiles(False, 128, *fits, 8, stages) for stages in (4, 3, 2)]
    fits = math.gcd(columns, 128), math.gcd(depth, 64)
    # one block of 256 rows on a multiprocessor, or two of 128
    rows, many = (128, (3, 2)) if few else (256, (4, 3))
    return [Tiles(True, rows, *fits, 8, stages) for stages in many]


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
