"""The backward kernel of q: one program per tile of query rows and head, one loop over its keys.

It also writes what the kernel of k and v needs of each row: lse and delta (see `row_statistics`).
"""

# what triton.jit makes of a function is not what a type checker reads: its constants are numbers
# in the branches of `if`, which decide while compiling
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from ._triton_launch import Configuration
from ._triton_rules import (
    LOG2E,
    gain_slope,
    interval,
    keeps,
    key_range,
    load_rows,
    probabilities,
    read_tile,
    score_slope,
    scratch_start,
    sees,
    store_rows,
)


@triton.jit
def row_statistics(
    out_ptr,
    b_grad,
    lse_ptr,
    grad_lse_ptr,
    o_rows,
    length_q,
    o_stats,
    stride_ot,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Return lse in units of log 2 and delta, sum(o * grad_out) - grad_lse, of some rows.

    Rows without a key, and those past the end, get inf and 0: their probabilities become 0, and
    whatever gradient their lse has is left out.
    """
    m_rows = o_rows < length_q
    lse = tl.load(lse_ptr + o_stats, mask=m_rows, other=float("-inf"))
    delta = tl.zeros_like(lse)
    if E:
        b_out = load_rows(out_ptr, o_rows, length_q, stride_ot, BLOCK_E, E)
        delta += tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + o_stats, mask=m_rows, other=0.0)
    alive = lse != float("-inf")
    return tl.where(alive, lse * LOG2E, float("inf")), tl.where(alive, delta, 0.0)


@triton.jit(do_not_specialize=["left", "right", "limit", "threshold"])
def backward_queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    out_ptr,
    lse_ptr,
    grad_lse_ptr,
    stats_ptr,
    dq_ptr,
    dgain_ptr,
    where_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    slopes_ptr,
    gain_ptr,
    seed_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    stride_ot,
    stride_oh,
    stride_stats,
    stride_slopes,
    heads,
    group,
    scale,
    left,
    right,
    limit,
    a,
    b,
    threshold,
    kept_scale,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    MASK: tl.constexpr,
    TRANSFORM: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # heads fastest: those that share keys run side by side and find them in the cache
    i_head = tl.program_id(0) % heads
    i_part = tl.program_id(0) // heads
    document, first, start_q, length_q, start_k, length_k = read_tile(
        where_ptr, i_part // PARTS, cu_seqlens_q_ptr, cu_seqlens_k_ptr
    )
    first += i_part % PARTS * BLOCK_Q
    begin, end = key_range(first, BLOCK_Q, length_q, length_k, left, right, limit)
    # parts of a tile may lie behind the document
    end = tl.where(first < length_q, end, begin)
    o_rows = first + tl.arange(0, BLOCK_Q)
    o_block = tl.arange(0, BLOCK_K)
    m_rows = o_rows < length_q
    lo, hi = interval(o_rows, length_q, length_k, left, right, limit, MASK)
    q_ptr += start_q * stride_qt + i_head.to(tl.int64) * stride_qh
    k_ptr += start_k * stride_kt + (i_head // group).to(tl.int64) * stride_kh
    v_ptr += start_k * stride_vt + (i_head // group).to(tl.int64) * stride_vh
    grad_ptr += start_q * stride_gt + i_head.to(tl.int64) * stride_gh
    out_ptr += start_q * stride_ot + i_head.to(tl.int64) * stride_oh
    b_q = load_rows(q_ptr, o_rows, length_q, stride_qt, BLOCK_D, D)
    b_grad = load_rows(grad_ptr, o_rows, length_q, stride_gt, BLOCK_E, E)
    if TMA:
        # a descriptor has at least one row; of an empty document none is loaded
        k_rows = tl.make_tensor_descriptor(
            k_ptr, [tl.maximum(length_k, 1), D], [stride_kt, 1], [BLOCK_K, BLOCK_D]
        )
        if E:
            v_rows = tl.make_tensor_descriptor(
                v_ptr, [tl.maximum(length_k, 1), E], [stride_vt, 1], [BLOCK_K, BLOCK_E]
            )

    o_stats = (start_q + o_rows) * heads + i_head
    lse, delta = row_statistics(
        out_ptr, b_grad, lse_ptr, grad_lse_ptr, o_rows, length_q, o_stats, stride_ot, E, BLOCK_E
    )
    stats_ptr += 2 * i_head.to(tl.int64) * stride_stats + scratch_start(start_q, document)
    tl.store(stats_ptr + o_rows, lse, mask=m_rows)
    tl.store(stats_ptr + stride_stats + o_rows, delta, mask=m_rows)
    b_gain = 1.0
    slope = 0.0
    if gain_ptr is not None:
        b_gain = tl.load(gain_ptr + o_stats, mask=m_rows, other=0.0)[:, None]
        b_dgain = tl.zeros([BLOCK_Q], tl.float32)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + document * stride_slopes + i_head)

    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for first_key in tl.range(begin, end, BLOCK_K, warp_specialize=SPECIALIZED):
        o_keys = first_key + o_block
        if TMA:
            b_k = k_rows.load([first_key, 0])
        else:
            b_k = load_rows(k_ptr, o_keys, length_k, stride_kt, BLOCK_D, D)
        dot = tl.dot(b_q, b_k.T, input_precision="ieee")
        p = probabilities(
            dot,
            lse[:, None],
            b_gain,
            o_rows[:, None],
            o_keys[None, :],
            length_q,
            length_k,
            slope,
            scale,
            a,
            b,
            TRANSFORM,
            slopes_ptr is not None,
        )
        # in keys of this block: a comparison with a constant, which takes no register
        seen = sees(o_block[None, :], (lo - first_key)[:, None], (hi - first_key)[:, None], MASK)
        p = tl.where(seen, p, 0.0)
        ds = -delta[:, None]
        if E:
            if TMA:
                b_v = v_rows.load([first_key, 0])
            else:
                b_v = load_rows(v_ptr, o_keys, length_k, stride_vt, BLOCK_E, E)
            dp = tl.dot(b_grad, b_v.T, input_precision="ieee")
            if seed_ptr is not None:
                kept = keeps(seed_ptr, o_rows[:, None], o_keys[None, :], start_q, i_head, threshold)
                dp = tl.where(kept, dp * kept_scale, 0.0)
            ds += dp
        ds = p * ds
        if gain_ptr is not None:
            b_dgain += tl.sum(ds * gain_slope(dot, b_gain, scale, a, b), 1)
        if TRANSFORM != "none":
            ds *= score_slope(dot, b_gain, scale, a, b, TRANSFORM)
        b_dq = tl.dot(ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")

    dq_ptr += (start_q * heads + i_head) * D
    store_rows(dq_ptr, b_dq * scale, o_rows, length_q, heads * D, BLOCK_D, D)
    if gain_ptr is not None:
        tl.store(dgain_ptr + o_stats, b_dgain, mask=m_rows)


def configurations(
    major: int, rows: int, columns: int, itemsize: int, *, tma: bool, heavy: bool
) -> list[Configuration]:
    """Return the ways to compile the kernel, the best first; all have the same `queries`.

    Args:
        major: of the compute capability.
        rows: of the tiles in the list; a multiple of `queries`.
        columns: the larger of the two padded head sizes.
        tma: whether descriptors can address the tensors.
        heavy: whether scores or dropout need many registers.
    """
    if itemsize == 4:
        # products of float32 hold whole heads in registers
        queries = 32 if columns <= 64 else 16
        return [Configuration(False, False, queries, 16, 4 if columns <= 64 else 8, 1)]
    if columns > 128 and major < 9:
        return [Configuration(False, False, 64, keys, 8, 2) for keys in (32, 16)]
    keys_of = [32] if heavy or columns > 128 else [64, 32]
    pointers = [Configuration(False, False, rows, keys, rows // 16, 2) for keys in keys_of]
    descriptors = [pointer._replace(tma=True) for pointer in pointers]
    if major != 9 or not tma:
        return pointers
    # to write descriptors takes as long as a short document's keys
    return [*pointers, *descriptors] if rows == 64 else [*descriptors, *pointers]
