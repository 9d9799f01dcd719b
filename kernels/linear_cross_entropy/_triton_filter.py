"""Which tiles of a chunk's gradient the filtered loss multiplies: the rule of Cut Cross-Entropy.

The first product leaves the largest logit of each row's piece of columns, so nothing of a chunk
is read again to decide; tiles are as high as those of the products, and as wide as a piece.
"""

# what triton.jit makes of a function is not what a type checker reads
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_launch as run
from ._triton_launch import Case
from ._triton_tiles import rows_here


class Active(NamedTuple):
    """The tiles of a chunk that count."""

    flags: Tensor  # (row tiles, column tiles) int32
    size: tuple[int, int]  # rows and columns of a tile


class Kept(NamedTuple):
    """For each tile of a product's rows, the tiles along its sum: those that count come first."""

    tiles: Tensor  # (tiles of rows, tiles of the sum), in order
    counts: Tensor  # (tiles of rows,)
    size: int  # rows or columns of a tile of the sum


@triton.jit(do_not_specialize=["first"])
def active_kernel(
    active_ptr,
    largest_ptr,
    center_ptr,
    lse_ptr,
    order_ptr,
    count_ptr,
    first,
    C,
    pieces,
    pitch,
    least,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write 1 where the log of a row's largest softmax in a tile is not below `least`, else 0."""
    here = rows_here(count_ptr, first, C)
    blocks = tl.cdiv(pieces, BLOCK_P)
    i_tile = tl.program_id(0) // blocks
    o_rows = i_tile * ROWS + tl.arange(0, ROWS)
    o_pieces = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    m_rows, m_pieces = o_rows < here, o_pieces < pieces
    m_block = m_rows[:, None] & m_pieces[None, :]
    source = tl.load(order_ptr + o_rows, mask=m_rows, other=0)
    center = tl.load(center_ptr + o_rows, mask=m_rows, other=0.0)
    below = center - tl.load(lse_ptr + source, mask=m_rows, other=0.0)
    o_block = o_pieces.to(tl.int64)[None, :] * pitch + o_rows[:, None]
    largest = tl.load(largest_ptr + o_block, mask=m_block, other=float("-inf"))
    # so that what is not a number counts
    counts = m_block & ~(largest + below[:, None] < least)
    out = active_ptr + i_tile * pieces + o_pieces
    tl.store(out, tl.max(counts.to(tl.int32), 0), mask=m_pieces)


def active_tiles(case: Case, rows: slice, lse: Tensor, center: Tensor, sums: Tensor) -> Active:
    """Return the tiles with a softmax of at least `threshold`; the labels' are still to be added.

    Args:
        lse: of each token.
        center: (P,), from where the exponentials count.
        sums: (S, pieces, C), of which the third is the largest logit from there.
    """
    tile, C = run.exponential_choices(case)[0], rows.stop - rows.start
    pieces, blocks = sums.shape[1], triton.cdiv(sums.shape[1], 32)
    flags = sums.new_empty(triton.cdiv(C, tile.rows), pieces, dtype=torch.int32)
    arguments = {
        "active_ptr": flags,
        "largest_ptr": sums[2],
        "center_ptr": center[rows],
        "lse_ptr": lse,
        "order_ptr": case.order[rows],
        "count_ptr": case.n_valid,
        "first": rows.start,
        "C": C,
        "pieces": pieces,
        "pitch": sums.shape[2],
        "least": math.log(threshold(case.x.dtype)),
        "ROWS": tile.rows,
        "BLOCK_P": 32,
    }
    run.each_row(active_kernel, len(flags) * blocks, arguments)
    return Active(flags, (tile.rows, tile.piece))


def threshold(dtype: torch.dtype) -> float:
    """Return the softmax below which an entry of the gradient is as good as 0."""
    return torch.finfo(dtype).eps / 32


def kept(active: Active) -> tuple[Kept, Kept]:
    """Return the tiles for the gradient of input, and those for the gradient of weight."""
    rows, columns = active.size
    return _listed(active.flags, columns), _listed(active.flags.t(), rows)


def _listed(flags: Tensor, size: int) -> Kept:
    # stable: products add up in the same order as without a filter
    tiles = torch.argsort(flags, dim=1, descending=True, stable=True).to(torch.int32)
    return Kept(tiles.contiguous(), flags.sum(1, dtype=torch.int32), size)
