"""What the Triton kernels share: tiles, masks, scores and dropout, as device functions.

Positions inside a document are int32, rows of a tensor int64. Scores are in units of log 2 (the
hardware's exponential is 2**x); slopes of scores are in natural units.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# below this exp(x) replaces softplus(x): the two differ by less than 1e-13 of themselves
FAR_LEFT = tl.constexpr(-30.0)


@triton.jit
def read_tile(where_ptr, i_tile, cu_seqlens_q_ptr, cu_seqlens_k_ptr):
    """Return (document, first row in it, first row of q, I, first row of k, J); J = 0 if none."""
    document = tl.load(where_ptr + 2 * i_tile)
    first = tl.load(where_ptr + 2 * i_tile + 1)
    some = document >= 0
    document = tl.maximum(document, 0)
    start_q = tl.load(cu_seqlens_q_ptr + document).to(tl.int64)
    start_k = tl.load(cu_seqlens_k_ptr + document).to(tl.int64)
    length_q = (tl.load(cu_seqlens_q_ptr + document + 1) - start_q).to(tl.int32)
    length_k = (tl.load(cu_seqlens_k_ptr + document + 1) - start_k).to(tl.int32)
    length_q = tl.where(some, length_q, 0)
    length_k = tl.where(some, length_k, 0)
    return document, first, start_q, length_q, start_k, length_k


@triton.jit
def load_rows(ptr, o_rows, length, stride, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Return rows of a document as (rows, BLOCK), zeros past its end and past SIZE columns.

    ptr is that of the document's first row.
    """
    o_columns = tl.arange(0, BLOCK)
    m_rows = o_rows[:, None] < length
    if SIZE != BLOCK:
        m_rows = m_rows & (o_columns[None, :] < SIZE)
    return tl.load(
        ptr + o_rows.to(tl.int64)[:, None] * stride + o_columns[None, :], mask=m_rows, other=0.0
    )


@triton.jit
def store_rows(ptr, b_rows, o_rows, length, stride, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Write (rows, BLOCK) to the rows of a document, nothing past its end."""
    o_columns = tl.arange(0, BLOCK)
    m_rows = o_rows[:, None] < length
    if SIZE != BLOCK:
        m_rows = m_rows & (o_columns[None, :] < SIZE)
    tl.store(
        ptr + o_rows.to(tl.int64)[:, None] * stride + o_columns[None, :],
        b_rows.to(ptr.dtype.element_ty),
        mask=m_rows,
    )


@triton.jit
def key_range(first, ROWS: tl.constexpr, length_q, length_k, left, right, limit):
    """Return the keys [begin, end) that any of ROWS query rows from `first` on sees."""
    last = tl.minimum(first + ROWS, length_q) - 1
    shift = length_k - length_q
    begin = tl.maximum((first + shift).to(tl.int64) - left, 0)
    end = tl.minimum((last + shift).to(tl.int64) + right + 1, tl.minimum(length_k, limit))
    return tl.minimum(begin, length_k).to(tl.int32), tl.maximum(end, 0).to(tl.int32)


@triton.jit
def query_range(first, KEYS: tl.constexpr, length_q, length_k, left, right, limit):
    """Return the query rows [begin, end) that see any of KEYS keys from `first` on."""
    last = tl.minimum(first + KEYS, length_k) - 1
    shift = length_k - length_q
    begin = tl.maximum((first - shift).to(tl.int64) - right, 0)
    end = tl.minimum((last - shift).to(tl.int64) + left + 1, length_q)
    end = tl.where(first < limit, tl.maximum(end, 0), 0)
    return tl.minimum(begin, length_q).to(tl.int32), end.to(tl.int32)


@triton.jit
def interval(o_rows, length_q, length_k, left, right, limit, MASK: tl.constexpr):
    """Return (lo, hi), the first and last key that each row sees; hi < lo where it sees none.

    MASK: "full" and "causal" need neither left, right nor limit; "window" takes all. Rows past the
    document's end are not masked here.
    """
    position = o_rows + (length_k - length_q)
    lo = tl.zeros_like(o_rows)
    if MASK == "full":
        hi = lo + (length_k - 1)
    elif MASK == "causal":
        hi = tl.minimum(position, length_k - 1)
    else:
        lo = tl.maximum(position.to(tl.int64) - left, 0)
        lo = tl.minimum(lo, length_k).to(tl.int32)
        hi = tl.minimum(position.to(tl.int64) + right, tl.minimum(length_k, limit) - 1)
        hi = tl.maximum(hi, -1).to(tl.int32)
    return lo, hi


@triton.jit
def row_interval(o_keys, length_q, length_k, left, right, limit, MASK: tl.constexpr):
    """Return (first, last), the first and last query row that sees each key, as `interval`."""
    position = o_keys - (length_k - length_q)
    last = tl.zeros_like(o_keys) + (length_q - 1)
    if MASK == "causal":
        first = tl.maximum(position, 0)
    else:
        first = tl.maximum(position.to(tl.int64) - right, 0)
        first = tl.where(o_keys < limit, tl.minimum(first, length_q).to(tl.int32), length_q)
        last = tl.minimum(position.to(tl.int64) + left, last)
        last = tl.maximum(last, -1).to(tl.int32)
    return first, last


@triton.jit
def sees(o_keys, lo, hi, MASK: tl.constexpr):
    """Return where a row sees a key; the three arguments broadcast against each other."""
    seen = o_keys <= hi
    if MASK == "window":
        seen = seen & (o_keys >= lo)
    return seen


@triton.jit
def exp_minus_abs(x):
    """Return exp(-|x|), which cannot overflow."""
    return tl.exp2(-tl.abs(x) * LOG2E)


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent: a series near 0, where 1 - exp(-2x) cancels."""
    square = x * x
    series = 62.0 / 2835.0 + square * (-1382.0 / 155925.0)
    series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * series)
    series = x * (1.0 + square * (-1.0 / 3.0 + square * series))
    small = exp_minus_abs(2.0 * x)
    far = (1.0 - small) / (1.0 + small)
    return tl.where(square < 0.0625, series, tl.where(x < 0.0, -far, far))


@triton.jit
def softplus(x):
    """Return ln(1 + exp(x)) with a small relative error, down to where exp(x) underflows."""
    # log1p(t) = 2 artanh(t / (2 + t)); its argument is at most 1/3, so seven terms suffice
    small = exp_minus_abs(x)
    z = small / (2.0 + small)
    square = z * z
    series = 1.0 / 9.0 + square * (1.0 / 11.0 + square * (1.0 / 13.0 + square * (1.0 / 15.0)))
    series = 1.0 + square * (
        1.0 / 3.0 + square * (1.0 / 5.0 + square * (1.0 / 7.0 + square * series))
    )
    return tl.maximum(x, 0.0) + 2.0 * z * series


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    small = exp_minus_abs(x)
    return tl.where(x < 0.0, small, 1.0) / (1.0 + small)


@triton.jit
def score(dot, b_gain, scale, a, b, TRANSFORM: tl.constexpr):
    """Return y(scale * dot) * log2(e), before ALiBi and masks; -inf where a power has no value.

    b_gain broadcasts against dot; only "power" reads it.
    """
    x = dot * scale
    if TRANSFORM == "softcap":
        y = tanh(x / a) * (a * LOG2E)
    elif TRANSFORM == "softplus":
        y = tl.where(x < FAR_LEFT, x * LOG2E, tl.log2(softplus(x)))
    elif TRANSFORM == "power":
        base = b_gain * softplus(x) - b
        y = tl.where(base > 0.0, tl.log2(tl.where(base > 0.0, base, 1.0)) * a, float("-inf"))
    else:
        y = x * LOG2E
    return y


@triton.jit
def score_slope(dot, b_gain, scale, a, b, TRANSFORM: tl.constexpr):
    """Return dy/dx at x = scale * dot; 0 where a power has no value."""
    x = dot * scale
    if TRANSFORM == "softcap":
        # 1 - tanh(x)**2 without the difference, which would leave nothing at a large x
        small = exp_minus_abs(2.0 * (x / a))
        slope = 4.0 * small / ((1.0 + small) * (1.0 + small))
    elif TRANSFORM == "softplus":
        slope = tl.where(x < FAR_LEFT, 1.0, sigmoid(x) / softplus(tl.maximum(x, FAR_LEFT)))
    elif TRANSFORM == "power":
        base = b_gain * softplus(x) - b
        slope = a * b_gain * sigmoid(x) / tl.where(base > 0.0, base, 1.0)
        slope = tl.where(base > 0.0, slope, 0.0)
    else:
        slope = tl.full(x.shape, 1.0, tl.float32)
    return slope


@triton.jit
def gain_slope(dot, b_gain, scale, a, b):
    """Return dy/dgain of transform "power"; 0 where the power has no value."""
    value = softplus(dot * scale)
    base = b_gain * value - b
    return tl.where(base > 0.0, a * value / tl.where(base > 0.0, base, 1.0), 0.0)


@triton.jit
def alibi(o_rows, o_keys, length_q, length_k, slope):
    """Return what ALiBi takes off the scores, in units of log 2; rows and keys broadcast."""
    distance = tl.abs(o_rows + (length_k - length_q) - o_keys)
    return distance.to(tl.float32) * (slope * LOG2E)


@triton.jit
def softmax_step(scores, factor, largest, total):
    """Return (weights, shrink, largest, total) after a block of factor * scores, factor > 0.

    Weights are 2 ** (factor * scores - largest); shrink is what earlier sums are multiplied by.
    """
    larger = tl.maximum(largest, tl.max(scores, 1) * factor)
    # rows that have seen nothing yet: -inf - -inf would be nan
    anchor = tl.where(larger == float("-inf"), 0.0, larger)
    weights = tl.exp2(scores * factor - anchor[:, None])
    shrink = tl.exp2(largest - anchor)
    return weights, shrink, larger, total * shrink + tl.sum(weights, 1)


@triton.jit
def keeps(seed_ptr, o_rows, o_keys, start_q, i_head, threshold):
    """Return where dropout keeps a probability; o_rows and o_keys have the scores' rank.

    threshold is floor(dropout * 2**32) - 2**31: an int32 for a comparison of signed words, as an
    unsigned argument would change its type with its value. Philox4x32-10 (Salmon et al. 2011,
    doi:10.1145/2063384.2063405), counter (key, absolute query row, head, 0).
    """
    rows = (o_rows + start_q).to(tl.int32)
    keys, rows = tl.broadcast(o_keys, rows)
    zero = tl.zeros_like(keys)
    word, _, _, _ = tl.philox(tl.load(seed_ptr), keys, rows, zero + i_head, zero)
    return (word.to(tl.int32, bitcast=True) ^ -2147483648) >= threshold


@triton.jit
def probabilities(
    dot,
    b_lse,
    b_gain,
    o_rows,
    o_keys,
    length_q,
    length_k,
    slope,
    scale,
    a,
    b,
    TRANSFORM: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """Return exp(score - lse) before masks and dropout; lse is in units of log 2."""
    if TRANSFORM == "none":
        # one multiplication, which the subtraction below absorbs
        scores = dot * (scale * LOG2E)
    else:
        scores = score(dot, b_gain, scale, a, b, TRANSFORM)
    if ALIBI:
        scores -= alibi(o_rows, o_keys, length_q, length_k, slope)
    return tl.exp2(scores - b_lse)


@triton.jit
def scratch_start(start_q, document):
    """Return where a document's rows begin in scratch memory: at a multiple of 16 bytes."""
    return start_q // 4 * 4 + 4 * document
