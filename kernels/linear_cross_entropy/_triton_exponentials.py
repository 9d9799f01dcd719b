"""The first product: logits, of which only exponentials leave the multiprocessor."""

# what triton.jit makes of a function is not what a type checker reads
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from .._common.triton_tiles import block_at, matrix, place
from ._triton_tiles import LOG2E, Configuration, capped, halves, rows_here


@triton.jit
def leave(
    acc,
    out,
    out_ptr,
    bias_ptr,
    class_ptr,
    sums_ptr,
    i_row,
    i_piece,
    pieces,
    o_rows,
    here,
    center,
    target,
    push,
    token,
    V,
    stride_out,
    pitch,
    scale,
    cap,
    nothing,
    GRADIENT: tl.constexpr,
    STATISTICS: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Write what leaves the multiprocessor of a piece of columns: exponentials and their sums."""
    o_columns = i_piece * PIECE + tl.arange(0, PIECE)
    m_columns = o_columns < V
    m_rows = o_rows < here
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o_columns, mask=m_columns, other=0.0).to(tl.float32)[None, :]
    z = acc * scale
    slope = 1.0
    if CAPPED:
        z, slope = capped(z, cap)
    b_class = 1.0
    if class_ptr is not None:
        b_class = tl.load(class_ptr + o_columns, mask=m_columns, other=0.0)[None, :]
    kept = m_rows[:, None] & m_columns[None, :] & (o_columns[None, :] != target[:, None])
    # one choice for the exponential, its product with t and the maximum: they are 0, 0 and least
    t = tl.where(kept, z - center[:, None], nothing)
    e = tl.exp2(t * LOG2E)
    # (which sum, piece, row): rows side by side
    sums = sums_ptr + i_piece.to(tl.int64) * pitch + o_rows
    step = pieces.to(tl.int64) * pitch
    tl.store(sums, tl.sum(e, 1), mask=m_rows)
    if STATISTICS:
        tl.store(sums + step, tl.sum(e * t, 1), mask=m_rows)
        tl.store(sums + 2 * step, tl.max(t, 1), mask=m_rows)
        if SMOOTH:
            seen = tl.where(m_columns[None, :], z * b_class, 0.0)
            tl.store(sums + 3 * step, tl.sum(seen, 1), mask=m_rows)
    if out_ptr is not None:
        if GRADIENT:
            e = e * push[:, None]
            if SMOOTH:
                e = tl.where(kept, e - token[:, None] * b_class, 0.0)
            e = e * scale
        if CAPPED:
            e = e * slope
        e = e.to(out_ptr.dtype.element_ty)
        if TMA:
            out.store([i_row * BLOCK_M, i_piece * PIECE], e)
        else:
            o_out = o_rows.to(tl.int64)[:, None] * stride_out + o_columns[None, :]
            tl.store(out_ptr + o_out, e, mask=m_columns[None, :])


@triton.jit(do_not_specialize=["first", "offset"])
def exponentials_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    bias_ptr,
    class_ptr,
    center_ptr,
    target_ptr,
    push_ptr,
    token_ptr,
    sums_ptr,
    count_ptr,
    again_ptr,
    again_count_ptr,
    first,
    offset,
    C,
    V,
    H,
    stride_x,
    stride_w,
    stride_out,
    pitch,
    scale,
    cap,
    share,
    nothing,
    STATISTICS: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr,
    PIECE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write exp(z - center), 0 at the target, and sums over each tile of columns.

    With push_ptr the gradient is written: push exp(z - center) - token share w, times the scale.
    """
    here = rows_here(count_ptr, first, C)
    row_tiles = tl.cdiv(here, BLOCK_M)
    if again_ptr is not None:
        row_tiles = tl.load(again_count_ptr).to(tl.int32)
    column_tiles = tl.cdiv(V, BLOCK_N)
    GRADIENT: tl.constexpr = push_ptr is not None
    out = None
    x = matrix(x_ptr, C, H, stride_x, BLOCK_M, BLOCK_K, TMA)
    w = matrix(w_ptr, V, H, stride_w, BLOCK_N, BLOCK_K, TMA)
    if out_ptr is not None:
        out = matrix(out_ptr, C, V, stride_out, BLOCK_M, PIECE, TMA)
    # a tile's first blocks are loaded while the one before it is finished
    for i in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        i_row, i_column = place(i, row_tiles, column_tiles)
        if again_ptr is not None:
            i_row = tl.load(again_ptr + i_row).to(tl.int32)
        o_rows = i_row * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, H, BLOCK_K):
            b_x = block_at(x, i_row * BLOCK_M, k, C, H, stride_x, BLOCK_M, BLOCK_K, TMA)
            b_w = block_at(w, i_column * BLOCK_N, k, V, H, stride_w, BLOCK_N, BLOCK_K, TMA)
            acc = tl.dot(b_x, b_w.T, acc, input_precision="ieee")

        m_rows = o_rows < here
        center = tl.load(center_ptr + o_rows, mask=m_rows, other=0.0)
        target = tl.load(target_ptr + o_rows, mask=m_rows, other=-1) - offset
        push = 0.0
        token = 0.0
        if GRADIENT:
            push = tl.load(push_ptr + o_rows, mask=m_rows, other=0.0)
            token = tl.load(token_ptr + o_rows, mask=m_rows, other=0.0) * share
        PARTS: tl.constexpr = BLOCK_N // PIECE
        # in pieces: a whole tile of exponentials beside its logits would not fit the registers
        if PARTS == 2:
            left, right = halves(acc)
        else:
            left = acc
        leave(
            left, out, out_ptr, bias_ptr, class_ptr, sums_ptr, i_row, i_column * PARTS,
            column_tiles * PARTS, o_rows, here, center, target, push, token, V, stride_out, pitch,
            scale, cap, nothing, GRADIENT, STATISTICS, CAPPED, SMOOTH, TMA, BLOCK_M, PIECE,
        )  # fmt: skip
        if PARTS == 2:
            leave(
                right, out, out_ptr, bias_ptr, class_ptr, sums_ptr, i_row, i_column * PARTS + 1,
                column_tiles * PARTS, o_rows, here, center, target, push, token, V, stride_out,
                pitch, scale, cap, nothing, GRADIENT, STATISTICS, CAPPED, SMOOTH, TMA, BLOCK_M,
                PIECE,
            )  # fmt: skip


def configurations(major: int, *, tma: bool, after: int) -> list[Configuration]:
    """Return the ways to compile the kernel, the best first; all cut the result alike.

    Args:
        major: of the compute capability.
        tma: whether descriptors can address the matrices.
        after: what follows the product and takes registers: 0 the exponential alone, 1 also a bias
            or smoothing, 2 a cap, 3 a cap and smoothing.
    """
    if major < 9 or not tma:
        # addresses take the registers that half of a wide tile would need
        columns = 64 if after >= 2 else 128
        return [Configuration(False, 128, columns, 32, 8, stages) for stages in (4, 3)]
    if after:
        columns = 64 if after == 3 else 128
        return [Configuration(True, 128, columns, 64, 8, stages) for stages in (4, 3)]
    return [Configuration(True, 128, 256, 64, 8, stages) for stages in (3, 2)]
