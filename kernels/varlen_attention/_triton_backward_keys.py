"""The backward kernel of k and v: one program per tile of keys and key head, one loop over rows.

The loop runs over all query heads that share the key head, so that nothing is added up outside.
Scores are transposed, (keys, rows): both sums over rows then are products of matrices as they lie.
"""

# what triton.jit makes of a function is not what a type checker reads: its constants are numbers
# in the branches of `if`, which decide while compiling
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from ._triton_launch import Configuration
from ._triton_rules import (
    keeps,
    load_rows,
    probabilities,
    query_range,
    read_tile,
    row_interval,
    score_slope,
    scratch_start,
    store_rows,
)


@triton.jit(do_not_specialize=["left", "right", "limit", "threshold"])
def backward_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    stats_ptr,
    dk_ptr,
    dv_ptr,
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
    stride_stats,
    stride_slopes,
    key_heads,
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
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    heads = key_heads * GROUP
    i_key_head = tl.program_id(0) % key_heads
    i_part = tl.program_id(0) // key_heads
    document, first, start_q, length_q, start_k, length_k = read_tile(
        where_ptr, i_part // PARTS, cu_seqlens_q_ptr, cu_seqlens_k_ptr
    )
    first += i_part % PARTS * BLOCK_K
    begin, end = query_range(first, BLOCK_K, length_q, length_k, left, right, limit)
    # parts of a tile may lie behind the document
    end = tl.where(first < length_k, end, 0)
    # 16 bytes of scratch memory
    begin = begin // 4 * 4
    o_keys = first + tl.arange(0, BLOCK_K)
    first_seeing, last_seeing = row_interval(o_keys, length_q, length_k, left, right, limit, MASK)
    o_block = tl.arange(0, BLOCK_Q)
    q_ptr += start_q * stride_qt
    grad_ptr += start_q * stride_gt
    stats_ptr += scratch_start(start_q, document)
    k_ptr += start_k * stride_kt + i_key_head.to(tl.int64) * stride_kh
    v_ptr += start_k * stride_vt + i_key_head.to(tl.int64) * stride_vh
    if TMA:
        # a descriptor has at least one row; of an empty document none is loaded
        rows = tl.maximum(length_q, 1)
        q_rows = tl.make_tensor_descriptor(
            q_ptr, [heads, rows, D], [stride_qh, stride_qt, 1], [1, BLOCK_Q, BLOCK_D]
        )
        k_rows = tl.make_tensor_descriptor(k_ptr, [length_k, D], [stride_kt, 1], [BLOCK_K, BLOCK_D])
        # two rows per head: lse and delta
        statistics = tl.make_tensor_descriptor(
            stats_ptr, [2 * heads, rows], [stride_stats, 1], [1, BLOCK_Q]
        )
        b_k = k_rows.load([first, 0])
        if E:
            grad_rows = tl.make_tensor_descriptor(
                grad_ptr, [heads, rows, E], [stride_gh, stride_gt, 1], [1, BLOCK_Q, BLOCK_E]
            )
            v_rows = tl.make_tensor_descriptor(
                v_ptr, [length_k, E], [stride_vt, 1], [BLOCK_K, BLOCK_E]
            )
            b_v = v_rows.load([first, 0])
    else:
        b_k = load_rows(k_ptr, o_keys, length_k, stride_kt, BLOCK_D, D)
        if E:
            b_v = load_rows(v_ptr, o_keys, length_k, stride_vt, BLOCK_E, E)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    if E:
        b_dv = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)

    # heads and rows in one loop without branches: the compiler specialises warps in no other form
    steps = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_Q)
    for step in tl.range(0, GROUP * steps, warp_specialize=SPECIALIZED):
        i_head = i_key_head
        first_row = begin + step * BLOCK_Q
        if GROUP > 1:
            i_head = i_key_head * GROUP + step // steps
            first_row = begin + step % steps * BLOCK_Q
        o_rows = first_row + o_block
        m_rows = o_rows < length_q
        if TMA:
            b_q = q_rows.load([i_head, first_row, 0]).reshape([BLOCK_Q, BLOCK_D])
            lse = statistics.load([2 * i_head, first_row]).reshape([BLOCK_Q])
            if slopes_ptr is not None or TRANSFORM == "power":
                # past the end all is 0, and so is what is added up, unless p overflows
                lse = tl.where(m_rows, lse, float("inf"))
        else:
            head_ptr = q_ptr + i_head.to(tl.int64) * stride_qh
            b_q = load_rows(head_ptr, o_rows, length_q, stride_qt, BLOCK_D, D)
            lse_ptr = stats_ptr + 2 * i_head.to(tl.int64) * stride_stats
            lse = tl.load(lse_ptr + o_rows, mask=m_rows, other=float("inf"))
        b_gain = 1.0
        slope = 0.0
        if gain_ptr is not None:
            o_gain = (start_q + o_rows) * heads + i_head
            b_gain = tl.load(gain_ptr + o_gain, mask=m_rows, other=0.0)[None, :]
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + document * stride_slopes + i_head)
        dot = tl.dot(b_k, b_q.T, input_precision="ieee")
        p = probabilities(
            dot,
            lse[None, :],
            b_gain,
            o_rows[None, :],
            o_keys[:, None],
            length_q,
            length_k,
            slope,
            scale,
            a,
            b,
            TRANSFORM,
            slopes_ptr is not None,
        )
        if MASK != "full":
            # in rows of this block: a comparison with a constant, which takes no register
            p = tl.where(o_block[None, :] >= (first_seeing - first_row)[:, None], p, 0.0)
        if MASK == "window":
            p = tl.where(o_block[None, :] <= (last_seeing - first_row)[:, None], p, 0.0)
        if E:
            if TMA:
                b_grad = grad_rows.load([i_head, first_row, 0]).reshape([BLOCK_Q, BLOCK_E])
            else:
                head_ptr = grad_ptr + i_head.to(tl.int64) * stride_gh
                b_grad = load_rows(head_ptr, o_rows, length_q, stride_gt, BLOCK_E, E)
            kept_p = p
            if seed_ptr is not None:
                kept = keeps(seed_ptr, o_rows[None, :], o_keys[:, None], start_q, i_head, threshold)
                kept_p = tl.where(kept, p, 0.0)
            b_dv = tl.dot(kept_p.to(b_grad.dtype), b_grad, b_dv, input_precision="ieee")
            dp = tl.dot(b_v, b_grad.T, input_precision="ieee")
            if seed_ptr is not None:
                dp = tl.where(kept, dp * kept_scale, 0.0)
        else:
            dp = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
        # read as late as it can be: rows of it take registers
        if TMA:
            delta = statistics.load([2 * i_head + 1, first_row]).reshape([BLOCK_Q])
        else:
            delta = tl.load(lse_ptr + stride_stats + o_rows, mask=m_rows, other=0.0)
        ds = p * (dp - delta[None, :])
        if TRANSFORM != "none":
            ds *= score_slope(dot, b_gain, scale, a, b, TRANSFORM)
        b_dk = tl.dot(ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")

    dk_ptr += (start_k * key_heads + i_key_head) * D
    store_rows(dk_ptr, b_dk * scale, o_keys, length_k, key_heads * D, BLOCK_D, D)
    if E:
        dv_ptr += (start_k * key_heads + i_key_head) * E
        store_rows(dv_ptr, b_dv * kept_scale, o_keys, length_k, key_heads * E, BLOCK_E, E)


def configurations(
    major: int, rows: int, columns: int, itemsize: int, *, tma: bool, heavy: bool
) -> list[Configuration]:
    """Return the ways to compile the kernel, the best first; all have the same `keys`.

    Args:
        major: of the compute capability.
        rows: of the tiles in the list; a multiple of `keys`.
        columns: the larger of the two padded head sizes.
        tma: whether descriptors can address the tensors.
        heavy: whether scores or dropout need many registers.
    """
    if itemsize == 4:
        # products of float32 hold whole heads in registers
        return [Configuration(False, False, 16, 32, max(4, columns // 32), 1)]
    if major < 9:
        return [Configuration(False, False, *((32, 64, 4) if columns <= 128 else (16, 64, 8)), 2)]
    keys = rows if columns <= 128 else 64
    warps = keys // 16 if columns <= 128 else 8
    wide, narrow = (Configuration(False, False, queries, keys, warps, 2) for queries in (64, 32))
    pointers = [narrow] if heavy or columns > 128 else [wide, narrow]
    if major > 9 or not tma:
        return pointers
    descriptors = [pointer._replace(tma=True) for pointer in pointers]
    if rows == 64:
        # to write descriptors takes as long as a short document's rows
        return [pointers[0], *descriptors, *pointers[1:]]
    # Triton 3.9 spills nothing; of the eight registers or less that 3.6 spills, the loop reads six
    special = Configuration(True, True, 64, keys, 4, 2, spills=16)
    return [*([] if heavy or columns > 128 else [special]), *descriptors, *pointers]
