"""The product of matrices that lie in memory as they may: each pass of Monarch is two or four."""

# what triton.jit makes of a function is not what a type checker reads
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from .._common.triton_tiles import place


@triton.jit
def product_kernel(
    out_ptr,
    left_ptr,
    right_ptr,
    bias_ptr,
    batch,
    M,
    N,
    K,
    stride_left_b,
    stride_left_m,
    far_left_m,
    stride_left_k,
    far_left_k,
    stride_right_b,
    stride_right_n,
    far_right_n,
    stride_right_k,
    far_right_k,
    stride_out_b,
    stride_out_m,
    far_out_m,
    stride_out_n,
    far_out_n,
    INNER_M: tl.constexpr,
    INNER_N: tl.constexpr,
    INNER_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write a tile of out[b] = left[b] right[b] + bias[b].

    An axis with an INNER is two: of index i, i % INNER takes steps of `stride`, i // INNER of
    `far`. Products of a batch are neighbours: what they write is, too, where they are combs.
    """
    i = tl.program_id(0)
    b = (i % batch).to(tl.int64)
    i_row, i_column = place(i // batch, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    o_m = i_row * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_column * BLOCK_N + tl.arange(0, BLOCK_N)
    left_ptr += b * stride_left_b
    right_ptr += b * stride_right_b
    rows = offsets(o_m, stride_left_m, far_left_m, INNER_M)
    columns = offsets(o_n, stride_right_n, far_right_n, INNER_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        o_left = rows[:, None] + offsets(o_k, stride_left_k, far_left_k, INNER_K)[None, :]
        o_right = offsets(o_k, stride_right_k, far_right_k, INNER_K)[:, None] + columns[None, :]
        m_left = (o_m[:, None] < M) & (o_k[None, :] < K)
        m_right = (o_k[:, None] < K) & (o_n[None, :] < N)
        b_left = tl.load(left_ptr + o_left, mask=m_left, other=0.0)
        b_right = tl.load(right_ptr + o_right, mask=m_right, other=0.0)
        acc = tl.dot(b_left, b_right, acc, input_precision=PRECISION)
    o_columns = offsets(o_n, stride_out_n, far_out_n, INNER_N)
    if bias_ptr is not None:
        # it lies as a row of out does
        each = tl.load(bias_ptr + b * stride_out_b + o_columns, mask=o_n < N, other=0.0)
        acc += each.to(tl.float32)[None, :]
    o_out = offsets(o_m, stride_out_m, far_out_m, INNER_M)[:, None] + o_columns[None, :]
    m_out = (o_m[:, None] < M) & (o_n[None, :] < N)
    out_ptr += b * stride_out_b
    tl.store(out_ptr + o_out, acc.to(out_ptr.dtype.element_ty), mask=m_out)


@triton.jit
def offsets(o, stride, far, INNER: tl.constexpr):
    """Return where the indices of an axis lie, from its beginning."""
    if INNER == 0:
        return o.to(tl.int64) * stride
    return (o // INNER).to(tl.int64) * far + (o % INNER).to(tl.int64) * stride
