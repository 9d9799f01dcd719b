"""Products with a matrix of low rank plus blocks, and with what of its gradient is stored."""

# what triton.jit makes of a function is not what a type checker reads
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from .._common.triton_tiles import block_at, load_block, matrix, place, store_block
from ._triton_tiles import columns_of, height_of


@triton.jit
def forward_kernel(
    out_ptr,
    hidden_ptr,
    b_ptr,
    x_ptr,
    values_ptr,
    bias_ptr,
    starts_ptr,
    chunks_ptr,
    T,
    N,
    M,
    R,
    stride_hidden,
    stride_b,
    stride_x,
    stride_out,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write a tile of scale hidden b.T + x S.T + bias; its columns are of one group."""
    i_row, i_column = place(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N))
    o_rows = i_row * BLOCK_M + tl.arange(0, BLOCK_M)
    o_columns = i_column * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    hidden = matrix(hidden_ptr, T, R, stride_hidden, BLOCK_M, BLOCK_K, TMA)
    b = matrix(b_ptr, N, R, stride_b, BLOCK_N, BLOCK_K, TMA)
    for k in range(0, R, BLOCK_K):
        b_hidden = block_at(hidden, i_row * BLOCK_M, k, T, R, stride_hidden, BLOCK_M, BLOCK_K, TMA)
        b_b = block_at(b, i_column * BLOCK_N, k, N, R, stride_b, BLOCK_N, BLOCK_K, TMA)
        acc = tl.dot(b_hidden, b_b.T, acc, input_precision=PRECISION)
    acc *= scale

    group = i_column * BLOCK_N // ROWS
    height = height_of(group, N, ROWS, EVEN)
    first = tl.load(starts_ptr + group)
    size = (tl.load(starts_ptr + group + 1) - first) * COLUMNS
    # all groups before this one are of full height
    values_ptr += first.to(tl.int64) * (ROWS * COLUMNS)
    o_inside = o_columns - group * ROWS
    for k in range(0, size, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        o_x = columns_of(chunks_ptr + first, o_k, o_k < size, COLUMNS, RUN)
        m_x = (o_rows[:, None] < T) & (o_k[None, :] < size)
        o_block = o_rows.to(tl.int64)[:, None] * stride_x + o_x[None, :]
        b_x = tl.load(x_ptr + o_block, mask=m_x, other=0.0)
        b_values = load_block(values_ptr, o_k, size, o_inside, height, height)
        acc = tl.dot(b_x, b_values, acc, input_precision=PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o_columns, mask=o_columns < N, other=0.0).to(tl.float32)[None, :]
    store_block(out_ptr, acc, o_rows, T, o_columns, N, stride_out)


@triton.jit
def input_kernel(
    out_ptr,
    hidden_ptr,
    a_ptr,
    grad_ptr,
    values_ptr,
    starts_ptr,
    chunks_ptr,
    chunk_starts_ptr,
    groups_ptr,
    order_ptr,
    T,
    N,
    M,
    R,
    stride_hidden,
    stride_a,
    stride_grad,
    stride_out,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write a tile of scale hidden a + grad S."""
    i_row, i_column = place(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.cdiv(M, BLOCK_N))
    o_rows = i_row * BLOCK_M + tl.arange(0, BLOCK_M)
    o_columns = i_column * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    hidden = matrix(hidden_ptr, T, R, stride_hidden, BLOCK_M, BLOCK_K, TMA)
    a = matrix(a_ptr, R, M, stride_a, BLOCK_K, BLOCK_N, TMA)
    grad = matrix(grad_ptr, T, N, stride_grad, BLOCK_M, BLOCK_K, TMA)
    for k in range(0, R, BLOCK_K):
        b_hidden = block_at(hidden, i_row * BLOCK_M, k, T, R, stride_hidden, BLOCK_M, BLOCK_K, TMA)
        b_a = block_at(a, k, i_column * BLOCK_N, R, M, stride_a, BLOCK_K, BLOCK_N, TMA)
        acc = tl.dot(b_hidden, b_a, acc, input_precision=PRECISION)
    acc *= scale

    # blocks are listed by their columns: those that touch this tile follow one another. each is
    # multiplied with zeros beside it, which costs less than results of 16 columns would
    across = M // COLUMNS
    i_first = tl.minimum(i_column * BLOCK_N // COLUMNS, across)
    i_last = tl.minimum(tl.cdiv((i_column + 1) * BLOCK_N, COLUMNS), across)
    begin, end = tl.load(chunk_starts_ptr + i_first), tl.load(chunk_starts_ptr + i_last)
    STEPS: tl.constexpr = ROWS // BLOCK_K
    for step in range(begin * STEPS, end * STEPS):
        i_block, group = tl.load(order_ptr + step // STEPS), tl.load(groups_ptr + step // STEPS)
        k = step % STEPS * BLOCK_K
        o_k, at = k + tl.arange(0, BLOCK_K), group * ROWS + k
        b_grad = block_at(grad, i_row * BLOCK_M, at, T, N, stride_grad, BLOCK_M, BLOCK_K, TMA)
        height = height_of(group, N, ROWS, EVEN)
        first = tl.load(starts_ptr + group).to(tl.int64)
        o_values = first * (ROWS * COLUMNS) + (i_block - first) * COLUMNS * height
        o_inside = o_columns - tl.load(chunks_ptr + i_block) * COLUMNS
        m_values = ((o_inside >= 0) & (o_inside < COLUMNS))[:, None] & (o_k[None, :] < height)
        o_block = o_values + o_inside[:, None] * height + o_k[None, :]
        b_values = tl.load(values_ptr + o_block, mask=m_values, other=0.0)
        acc = tl.dot(b_grad, b_values.T, acc, input_precision=PRECISION)

    store_block(out_ptr, acc, o_rows, T, o_columns, M, stride_out)


@triton.jit
def values_kernel(
    out_ptr,
    grad_ptr,
    x_ptr,
    starts_ptr,
    chunks_ptr,
    T,
    N,
    S,
    stride_grad,
    stride_x,
    across,
    span,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write tiles of (x.T grad) at a group's blocks, over `span` tokens, to their row of out.

    Programs are numbered by `across` tiles of columns, then by tiles of rows, then by tokens.
    """
    i = tl.program_id(0)
    tiles = tl.cdiv(N, BLOCK_N)
    i_row, i_part = i // across % tiles, i // across // tiles
    group = i_row * BLOCK_N // ROWS
    height = height_of(group, N, ROWS, EVEN)
    first = tl.load(starts_ptr + group)
    size = (tl.load(starts_ptr + group + 1) - first) * COLUMNS
    # a tile of rows may be a part of a group
    o_rows = i_row * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.minimum((i_part + 1) * span, T)
    out_ptr += i_part.to(tl.int64) * S + first.to(tl.int64) * (ROWS * COLUMNS)
    grad = matrix(grad_ptr, T, N, stride_grad, BLOCK_K, BLOCK_N, TMA)
    # once, unless groups differ by more than a tile
    for k in range(i % across * BLOCK_M, size, across * BLOCK_M):
        o_k = k + tl.arange(0, BLOCK_M)
        o_x = columns_of(chunks_ptr + first, o_k, o_k < size, COLUMNS, RUN)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for t in range(i_part * span, end, BLOCK_K):
            o_t = t + tl.arange(0, BLOCK_K)
            m_x = (o_t[:, None] < end) & (o_k[None, :] < size)
            o_block = o_t.to(tl.int64)[:, None] * stride_x + o_x[None, :]
            b_x = tl.load(x_ptr + o_block, mask=m_x, other=0.0)
            b_grad = block_at(grad, t, i_row * BLOCK_N, end, N, stride_grad, BLOCK_K, BLOCK_N, TMA)
            acc = tl.dot(b_x.T, b_grad, acc, input_precision=PRECISION)
        store_block(out_ptr, acc, o_k, size, o_rows - group * ROWS, height, height)
