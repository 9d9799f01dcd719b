"""What is done to rows rather than to tiles: gather them, finish their sums, mend their labels."""

# what triton.jit makes of a function is not what a type checker reads
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from ._triton_tiles import capped, rows_here

# above this a row's sum could leave float32 in a product with the weights: e**60
LARGEST = tl.constexpr(1.0e26)


@triton.jit
def gather_kernel(
    out_ptr,
    x_ptr,
    order_ptr,
    count_ptr,
    w_ptr,
    bias_ptr,
    ids_ptr,
    logits_ptr,
    target_ptr,
    V,
    H,
    K,
    stride_x,
    stride_w,
    stride_out,
    scale,
    cap,
    CAPPED: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Write valid rows of x one after the other, zeros after them, and the logits of their labels.

    One program per row. A label outside of the vocabulary gets NaN: raising would have to wait.
    """
    row = tl.program_id(0).to(tl.int64)
    valid = row < tl.load(count_ptr)
    source = tl.load(order_ptr + row)
    o_h = tl.arange(0, BLOCK_H)
    # nothing is read of other rows
    size = tl.where(valid, H, 0)
    for h in range(0, H, BLOCK_H):
        b_x = tl.load(x_ptr + source * stride_x + h + o_h, mask=h + o_h < size, other=0.0)
        tl.store(out_ptr + row * stride_out + h + o_h, b_x, mask=h + o_h < H)
    for k in range(K):
        label = tl.where(valid, tl.load(ids_ptr + source * K + k), 0)
        known = (label >= 0) & (label < V)
        at = tl.where(known, label, 0)
        dots = tl.zeros([BLOCK_H], tl.float32)
        for h in range(0, H, BLOCK_H):
            m_h = h + o_h < size
            b_x = tl.load(x_ptr + source * stride_x + h + o_h, mask=m_h, other=0.0)
            b_w = tl.load(w_ptr + at * stride_w + h + o_h, mask=m_h, other=0.0)
            dots += b_x.to(tl.float32) * b_w.to(tl.float32)
        z = tl.sum(dots, 0)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + at).to(tl.float32)
        z *= scale
        if CAPPED:
            z, _ = capped(z, cap)
        tl.store(logits_ptr + row * K + k, tl.where(known, z, float("nan")))
        if k == 0:
            tl.store(target_ptr + row, at.to(tl.int32))


@triton.jit
def log1p(r):
    """Return log(1 + r) in r's precision, also where 1 + r is 1."""
    u = 1.0 + r
    return tl.where(u == 1.0, r, tl.log(u) * (r / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit(do_not_specialize=["first", "tiles"])
def finish_kernel(
    loss_ptr,
    nll_ptr,
    lse_ptr,
    entropy_ptr,
    correct_ptr,
    sums_ptr,
    center_ptr,
    again_ptr,
    logits_ptr,
    order_ptr,
    count_ptr,
    token_ptr,
    share_ptr,
    class_sum_ptr,
    factor_ptr,
    push_ptr,
    rest_ptr,
    own_ptr,
    first,
    C,
    tiles,
    pitch,
    K,
    share,
    z_loss,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Finish the sums of rows: their five values, and what the gradients need of them.

    With again_ptr, rows whose sum leaves the range are marked there and centred at their maximum.
    """
    here = rows_here(count_ptr, first, C)
    o_rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(0) * BLOCK_R < here:
        m_rows = o_rows < here
        rest = tl.zeros([BLOCK_R], tl.float64)
        moment = tl.zeros([BLOCK_R], tl.float64)
        seen = tl.zeros([BLOCK_R], tl.float64)
        largest = tl.full([BLOCK_R], float("-inf"), tl.float32)
        step = tiles.to(tl.int64) * pitch
        # in this order in every run
        for i in range(0, tiles, BLOCK_T):
            o_tiles = i + tl.arange(0, BLOCK_T)
            block = sums_ptr + o_tiles.to(tl.int64)[:, None] * pitch + o_rows[None, :]
            m_block = (o_tiles[:, None] < tiles) & m_rows[None, :]
            rest += tl.sum(tl.load(block, mask=m_block, other=0.0).to(tl.float64), 0)
            moment += tl.sum(tl.load(block + step, mask=m_block, other=0.0).to(tl.float64), 0)
            top = tl.load(block + 2 * step, mask=m_block, other=float("-inf"))
            largest = tl.maximum(largest, tl.max(top, 0))
            if class_sum_ptr is not None:
                some = tl.load(block + 3 * step, mask=m_block, other=0.0)
                seen += tl.sum(some.to(tl.float64), 0)
        center = tl.load(center_ptr + o_rows, mask=m_rows, other=0.0)
        logit = tl.load(logits_ptr + o_rows.to(tl.int64) * K, mask=m_rows, other=0.0)
        if again_ptr is not None:
            # not a number comes here too, and stays one
            outside = m_rows & ~(rest < LARGEST)
            tl.store(again_ptr + o_rows, outside.to(tl.int32), mask=m_rows)
            centered = tl.maximum(logit, largest + center)
            tl.store(center_ptr + o_rows, tl.where(outside, centered, center), mask=m_rows)

        below = logit.to(tl.float64) - center.to(tl.float64)
        own = tl.exp(below)
        total = rest + own
        # a loss far below float's epsilon where the target has nearly all of the sum
        small = rest <= own
        ratio = tl.where(small, rest / tl.where(own > 0.0, own, 1.0), 0.0)
        nll = tl.where(small, log1p(ratio), tl.log(total) - below)
        lse = logit.to(tl.float64) + nll
        entropy = nll - (moment - below * rest) / total
        source = tl.load(order_ptr + o_rows, mask=m_rows, other=0)
        token = tl.load(token_ptr + o_rows, mask=m_rows, other=0.0)
        weight = tl.load(share_ptr + source * K, mask=m_rows, other=0.0)
        loss = weight * nll + z_loss * lse * lse
        mass, size = weight, tl.abs(weight)
        for k in range(1, K):
            weight = tl.load(share_ptr + source * K + k, mask=m_rows, other=0.0)
            z = tl.load(logits_ptr + o_rows.to(tl.int64) * K + k, mask=m_rows, other=0.0)
            # a share of 0 has no logit to speak of
            loss += tl.where(weight == 0.0, 0.0, weight * (lse - z))
            mass += weight
            size += tl.abs(weight)
        if class_sum_ptr is not None:
            class_sum = tl.load(class_sum_ptr)
            loss += share * (class_sum * lse - seen)
            mass += share * class_sum
        tl.store(loss_ptr + source, loss.to(tl.float32), mask=m_rows)
        tl.store(nll_ptr + source, nll.to(tl.float32), mask=m_rows)
        tl.store(lse_ptr + source, lse.to(tl.float32), mask=m_rows)
        tl.store(entropy_ptr + source, entropy.to(tl.float32), mask=m_rows)
        right = (below >= largest.to(tl.float64)).to(tl.float32)
        tl.store(correct_ptr + source, right, mask=m_rows)
        if factor_ptr is not None:
            push = token * (mass + 2.0 * z_loss * lse)
            # labels are divided by it; less than a rounding of theirs changes nothing
            least = 1.0e-6 * tl.abs(token) * size
            push = tl.where(tl.abs(push) < least, least, push)
            tl.store(push_ptr + o_rows, push.to(tl.float32), mask=m_rows)
            tl.store(factor_ptr + o_rows, (push / total).to(tl.float32), mask=m_rows)
            tl.store(rest_ptr + o_rows, (rest / total).to(tl.float32), mask=m_rows)
            tl.store(own_ptr + o_rows, (own / total).to(tl.float32), mask=m_rows)


@triton.jit(do_not_specialize=["first", "offset"])
def labels_kernel(
    e_ptr,
    scaled_ptr,
    x_ptr,
    order_ptr,
    count_ptr,
    ids_ptr,
    share_ptr,
    logits_ptr,
    token_ptr,
    class_ptr,
    lse_ptr,
    push_ptr,
    factor_ptr,
    rest_ptr,
    own_ptr,
    active_ptr,
    first,
    offset,
    C,
    V,
    H,
    K,
    stride_e,
    stride_x,
    stride_scaled,
    stride_active,
    scale,
    cap,
    share,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Write a row's gradient at its labels, and x times the row's factor and scale.

    Without factor_ptr the tile holds the gradient itself, of columns from `offset` on, and the
    target's column is left alone. With active_ptr the tiles of the labels are marked there.
    """
    row = tl.program_id(0).to(tl.int64)
    here = rows_here(count_ptr, first, C)
    if row < tl.cdiv(here, ROWS) * ROWS:
        valid = row < here
        factor = 1.0
        if factor_ptr is not None:
            factor = tl.where(valid, tl.load(factor_ptr + row), 0.0)
        if scaled_ptr is not None:
            o_h = tl.arange(0, BLOCK_H)
            for h in range(0, H, BLOCK_H):
                m_h = h + o_h < H
                b_x = tl.load(x_ptr + row * stride_x + h + o_h, mask=m_h, other=0.0)
                b_x = b_x.to(tl.float32) * (factor * scale)
                place_ptr = scaled_ptr + row * stride_scaled + h + o_h
                tl.store(place_ptr, b_x.to(scaled_ptr.dtype.element_ty), mask=m_h)
        source = tl.load(order_ptr + row)
        o_k = tl.arange(0, BLOCK_K)
        m_k = o_k < tl.where(valid, K, 0)
        b_ids = tl.load(ids_ptr + source * K + o_k, mask=m_k, other=-1)
        b_z = tl.load(logits_ptr + row * K + o_k, mask=m_k, other=0.0)
        token = tl.load(token_ptr + row)
        push = tl.load(push_ptr + row)
        lse = tl.load(lse_ptr + source)
        # equal labels add up, and all of them write the same
        pull = tl.zeros([BLOCK_K], tl.float32)
        for k in range(1, K):
            label = tl.load(ids_ptr + source * K + k)
            weight = tl.load(share_ptr + source * K + k)
            pull += tl.where(b_ids == label, weight * token, 0.0)
        value = push * tl.exp(b_z - lse) - pull
        target = tl.load(ids_ptr + source * K)
        is_target = b_ids == target
        column = b_ids - offset
        m_k = m_k & (column >= 0) & (column < V)
        if active_ptr is not None:
            tl.store(active_ptr + row // ROWS * stride_active + column // PIECE, 1, mask=m_k)
        if factor_ptr is not None:
            # p - 1 without the difference
            rest = tl.load(rest_ptr + row)
            own = tl.load(own_ptr + row)
            pulled = token * tl.load(share_ptr + source * K)
            value = tl.where(is_target, (push - pulled) * own - pulled * rest - pull, value)
            value = tl.where(factor == 0.0, 0.0, value / tl.where(factor == 0.0, 1.0, factor))
        else:
            m_k = m_k & (b_ids != target)
            if class_ptr is not None:
                value -= token * share * tl.load(class_ptr + column, mask=m_k, other=0.0)
            else:
                value -= token * share
            value *= scale
        if CAPPED:
            value *= (1.0 - b_z / cap) * (1.0 + b_z / cap)
        place_ptr = e_ptr + row * stride_e + column
        tl.store(place_ptr, value.to(e_ptr.dtype.element_ty), mask=m_k)
