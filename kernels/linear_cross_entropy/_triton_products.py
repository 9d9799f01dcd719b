"""The other two products: a chunk's gradients of input, weight and bias from its exponentials."""

# what triton.jit makes of a function is not what a type checker reads
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from .._common.triton_tiles import block_at, load_block, matrix, place
from ._triton_tiles import Configuration, halves, rows_here


@triton.jit
def listed(kept_ptr, step, KEPT: tl.constexpr):
    """Return where the block lies that is `step` rows or columns into the listed tiles."""
    return tl.load(kept_ptr + step // KEPT) * KEPT + step % KEPT


@triton.jit
def leave(
    acc,
    i_piece,
    out_ptr,
    order_ptr,
    factor_ptr,
    token_ptr,
    dense_ptr,
    o_rows,
    here,
    H,
    stride_out,
    scale,
    ADD: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Write a piece of the gradient of input to the rows' places, or add it."""
    o_columns = i_piece * PIECE + tl.arange(0, PIECE)
    m_rows, m_columns = o_rows < here, o_columns < H
    if factor_ptr is not None:
        acc *= (tl.load(factor_ptr + o_rows, mask=m_rows, other=0.0) * scale)[:, None]
    if dense_ptr is not None:
        token = tl.load(token_ptr + o_rows, mask=m_rows, other=0.0) * scale
        dense = tl.load(dense_ptr + o_columns, mask=m_columns, other=0.0)
        acc -= token[:, None] * dense[None, :]
    source = tl.load(order_ptr + o_rows, mask=m_rows, other=0).to(tl.int64)
    place_ptr = out_ptr + source[:, None] * stride_out + o_columns[None, :]
    m_block = m_rows[:, None] & m_columns[None, :]
    if ADD:
        acc += tl.load(place_ptr, mask=m_block, other=0.0)
    tl.store(place_ptr, acc, mask=m_block)


@triton.jit(do_not_specialize=["first"])
def input_kernel(
    out_ptr,
    e_ptr,
    w_ptr,
    order_ptr,
    count_ptr,
    factor_ptr,
    token_ptr,
    dense_ptr,
    kept_ptr,
    counts_ptr,
    first,
    C,
    V,
    H,
    stride_e,
    stride_w,
    stride_out,
    stride_kept,
    scale,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    KEPT: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write factor scale (e @ w) - token scale dense to the rows' places, or add it.

    With kept_ptr only the listed tiles of KEPT columns of e are multiplied.
    """
    here = rows_here(count_ptr, first, C)
    row_tiles, column_tiles = tl.cdiv(here, BLOCK_M), tl.cdiv(H, BLOCK_N)
    e = matrix(e_ptr, C, V, stride_e, BLOCK_M, BLOCK_K, TMA)
    w = matrix(w_ptr, V, H, stride_w, BLOCK_K, BLOCK_N, TMA)
    for i in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        i_row, i_column = place(i, row_tiles, column_tiles)
        o_rows = i_row * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        end = V
        if kept_ptr is not None:
            # never 0: the tiles of the labels are listed
            end = tl.load(counts_ptr + i_row) * KEPT
        for step in range(0, end, BLOCK_K):
            k = step
            if kept_ptr is not None:
                k = listed(kept_ptr + i_row * stride_kept, step, KEPT)
            b_e = block_at(e, i_row * BLOCK_M, k, C, V, stride_e, BLOCK_M, BLOCK_K, TMA)
            b_w = block_at(w, k, i_column * BLOCK_N, V, H, stride_w, BLOCK_K, BLOCK_N, TMA)
            acc = tl.dot(b_e, b_w.to(b_e.dtype), acc, input_precision=PRECISION)

        if BLOCK_N == 256:
            # in halves: to store a whole tile takes more shared memory than the loads leave
            left, right = halves(acc)
            leave(
                left, i_column * 2, out_ptr, order_ptr, factor_ptr, token_ptr, dense_ptr, o_rows,
                here, H, stride_out, scale, ADD, 128,
            )  # fmt: skip
            leave(
                right, i_column * 2 + 1, out_ptr, order_ptr, factor_ptr, token_ptr, dense_ptr,
                o_rows, here, H, stride_out, scale, ADD, 128,
            )  # fmt: skip
        else:
            leave(
                acc, i_column, out_ptr, order_ptr, factor_ptr, token_ptr, dense_ptr, o_rows,
                here, H, stride_out, scale, ADD, BLOCK_N,
            )  # fmt: skip


@triton.jit
def leave_sum(
    acc, i_piece, out_ptr, o_rows, V, H, stride_out, ADD: tl.constexpr, PIECE: tl.constexpr
):
    """Write a piece of the gradient of weight, or add it."""
    o_columns = i_piece * PIECE + tl.arange(0, PIECE)
    place_ptr = out_ptr + o_rows.to(tl.int64)[:, None] * stride_out + o_columns[None, :]
    m_block = (o_rows[:, None] < V) & (o_columns[None, :] < H)
    if ADD:
        acc += tl.load(place_ptr, mask=m_block, other=0.0)
    tl.store(place_ptr, acc, mask=m_block)


@triton.jit(do_not_specialize=["first"])
def weight_kernel(
    out_ptr,
    e_ptr,
    x_ptr,
    count_ptr,
    kept_ptr,
    counts_ptr,
    first,
    C,
    V,
    H,
    stride_e,
    stride_x,
    stride_out,
    stride_kept,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    KEPT: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write e.T @ x, or add it; with kept_ptr, of the listed tiles of KEPT rows of e."""
    here = rows_here(count_ptr, first, C)
    row_tiles, column_tiles = tl.cdiv(V, BLOCK_M), tl.cdiv(H, BLOCK_N)
    tiles = row_tiles * column_tiles
    if ADD:
        tiles = tl.where(here > 0, tiles, 0)
    e = matrix(e_ptr, C, V, stride_e, BLOCK_K, BLOCK_M, TMA)
    x = matrix(x_ptr, C, H, stride_x, BLOCK_K, BLOCK_N, TMA)
    # not flattened: there may be no rows, and then the inner loop does not run
    for i in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        i_row, i_column = place(i, row_tiles, column_tiles)
        o_rows = i_row * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        end = here
        if kept_ptr is not None:
            end = tl.load(counts_ptr + i_row) * KEPT
        for step in range(0, end, BLOCK_K):
            k = step
            if kept_ptr is not None:
                k = listed(kept_ptr + i_row * stride_kept, step, KEPT)
            # rows from `here` on are zeros to the end of the tile, in both
            if TMA:
                b_e = e.load([k, i_row * BLOCK_M]).T
            else:
                # by its addresses: what is turned after its load is not copied ahead on sm_80
                o_k = k + tl.arange(0, BLOCK_K)
                m_e = (o_rows[:, None] < V) & (o_k[None, :] < C)
                o_e = o_k.to(tl.int64)[None, :] * stride_e + o_rows[:, None]
                b_e = tl.load(e_ptr + o_e, mask=m_e, other=0.0)
            b_x = block_at(x, k, i_column * BLOCK_N, C, H, stride_x, BLOCK_K, BLOCK_N, TMA)
            acc = tl.dot(b_e, b_x.to(b_e.dtype), acc, input_precision=PRECISION)
        if BLOCK_N == 256:
            left, right = halves(acc)
            leave_sum(left, i_column * 2, out_ptr, o_rows, V, H, stride_out, ADD, 128)
            leave_sum(right, i_column * 2 + 1, out_ptr, o_rows, V, H, stride_out, ADD, 128)
        else:
            leave_sum(acc, i_column, out_ptr, o_rows, V, H, stride_out, ADD, BLOCK_N)


@triton.jit(do_not_specialize=["first"])
def bias_kernel(
    out_ptr,
    e_ptr,
    factor_ptr,
    count_ptr,
    first,
    C,
    V,
    stride_e,
    scale,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the sum over rows of factor scale e, or add it."""
    here = rows_here(count_ptr, first, C)
    o_columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros([BLOCK_V], tl.float32)
    for k in range(0, here, BLOCK_R):
        o_rows = k + tl.arange(0, BLOCK_R)
        b_e = load_block(e_ptr, o_rows, here, o_columns, V, stride_e).to(tl.float32)
        if factor_ptr is not None:
            factor = tl.load(factor_ptr + o_rows, mask=o_rows < here, other=0.0) * scale
            b_e *= factor[:, None]
        total += tl.sum(b_e, 0)
    if ADD:
        total += tl.load(out_ptr + o_columns, mask=o_columns < V, other=0.0)
    tl.store(out_ptr + o_columns, total, mask=o_columns < V)


def configurations(major: int, itemsize: int, *, tma: bool, listed: bool) -> list[Configuration]:
    """Return the ways to compile both products, the best first; all cut the result alike.

    Args:
        major: of the compute capability.
        itemsize: bytes of an exponential; 4 are multiplied as TensorFloat32.
        tma: whether descriptors can address the matrices.
        listed: whether blocks are where a list says.
    """
    # half of the stages go to the list: with these as many blocks are loaded ahead
    stages = (5, 3) if listed else (3, 2)
    if major < 9 or itemsize == 4 or not tma:
        # addresses take the registers that a wide tile would need
        return [Configuration(False, 128, 128, 32, 8, n) for n in stages]
    return [Configuration(True, 128, 256, 64, 8, n) for n in stages]
