"""The forward kernel: one program per tile of query rows and head, one loop over its keys."""

# what triton.jit makes of a function is not what a type checker reads: its constants are numbers
# in the branches of `if`, which decide while compiling
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common.triton_launch import capability, compiled_by, launch
from .._common.triton_tiles import fits_tma
from ._layout import PackedLayout
from ._rules import Rules
from ._tiles import Tiles
from ._triton_launch import Configuration, padded, rows_of
from ._triton_rules import (
    LN2,
    LOG2E,
    alibi,
    interval,
    keeps,
    key_range,
    load_rows,
    read_tile,
    score,
    sees,
    softmax_step,
    store_rows,
)

# transforms that take more registers than the widest tiles leave
_HEAVY = ("softplus", "power")


@triton.jit(do_not_specialize=["left", "right", "limit", "threshold"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    where_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    slopes_ptr,
    sinks_ptr,
    gain_ptr,
    seed_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
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
    LINEAR: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # heads fastest: those that share keys run side by side and find them in the cache
    i_part = tl.program_id(0) // heads
    i_head = tl.program_id(0) % heads
    document, first, start_q, length_q, start_k, length_k = read_tile(
        where_ptr, i_part // PARTS, cu_seqlens_q_ptr, cu_seqlens_k_ptr
    )
    first += i_part % PARTS * BLOCK_Q
    begin, end = key_range(first, BLOCK_Q, length_q, length_k, left, right, limit)
    o_rows = first + tl.arange(0, BLOCK_Q)
    lo, hi = interval(o_rows, length_q, length_k, left, right, limit, MASK)
    m_rows = o_rows < length_q
    # rows are counted from the document's first, and a load ends with its last: whatever lies in
    # other documents is never read, so that 0 * nan cannot occur
    q_ptr += start_q * stride_qt + i_head.to(tl.int64) * stride_qh
    k_ptr += start_k * stride_kt + (i_head // group).to(tl.int64) * stride_kh
    v_ptr += start_k * stride_vt + (i_head // group).to(tl.int64) * stride_vh
    if TMA:
        # a descriptor has at least one row; of an empty document none is loaded
        q_rows = tl.make_tensor_descriptor(
            q_ptr, [tl.maximum(length_q, 1), D], [stride_qt, 1], [BLOCK_Q, BLOCK_D]
        )
        k_rows = tl.make_tensor_descriptor(
            k_ptr, [tl.maximum(length_k, 1), D], [stride_kt, 1], [BLOCK_K, BLOCK_D]
        )
        if E:
            v_rows = tl.make_tensor_descriptor(
                v_ptr, [tl.maximum(length_k, 1), E], [stride_vt, 1], [BLOCK_K, BLOCK_E]
            )
        b_q = q_rows.load([first, 0])
    else:
        b_q = load_rows(q_ptr, o_rows, length_q, stride_qt, BLOCK_D, D)

    b_gain = 1.0
    slope = 0.0
    if sinks_ptr is not None:
        # a key without a value that every row sees first
        largest = tl.zeros([BLOCK_Q], tl.float32) + tl.load(sinks_ptr + i_head) * LOG2E
        total = tl.full([BLOCK_Q], 1.0, tl.float32)
    else:
        largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + (start_q + o_rows) * heads + i_head, mask=m_rows, other=0.0)
        b_gain = gain[:, None]
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + document * stride_slopes + i_head)
    if E:
        acc = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)

    # one loop without branches: any other form and the compiler does not specialise warps
    for first_key in tl.range(begin, end, BLOCK_K, warp_specialize=SPECIALIZED):
        o_keys = first_key + tl.arange(0, BLOCK_K)
        if TMA:
            b_k = k_rows.load([first_key, 0])
        else:
            b_k = load_rows(k_ptr, o_keys, length_k, stride_kt, BLOCK_D, D)
        dot = tl.dot(b_q, b_k.T, input_precision="ieee")
        seen = sees(o_keys[None, :], lo[:, None], hi[:, None], MASK)
        if LINEAR:
            # the scale is positive: one multiply-add with the subtraction of the largest
            factor = scale * LOG2E
        else:
            factor = 1.0
            dot = score(dot, b_gain, scale, a, b, TRANSFORM)
            if slopes_ptr is not None:
                dot -= alibi(o_rows[:, None], o_keys[None, :], length_q, length_k, slope)
        scores = tl.where(seen, dot, float("-inf"))
        weights, shrink, largest, total = softmax_step(scores, factor, largest, total)
        if E:
            if seed_ptr is not None:
                kept = keeps(seed_ptr, o_rows[:, None], o_keys[None, :], start_q, i_head, threshold)
                weights = tl.where(kept, weights, 0.0)
            if TMA:
                b_v = v_rows.load([first_key, 0])
            else:
                b_v = load_rows(v_ptr, o_keys, length_k, stride_vt, BLOCK_E, E)
            acc = acc * shrink[:, None]
            acc = tl.dot(weights.to(b_v.dtype), b_v, acc, input_precision="ieee")

    total = tl.where(total == 0.0, 1.0, total)
    lse = (largest + tl.log2(total)) * LN2
    tl.store(lse_ptr + (start_q + o_rows) * heads + i_head, lse, mask=m_rows)
    if E:
        acc = acc * (kept_scale / total)[:, None]
        out_ptr += start_q * stride_ot + i_head.to(tl.int64) * E
        store_rows(out_ptr, acc, o_rows, length_q, stride_ot, BLOCK_E, E)


def configurations(
    major: int, rows: int, columns: int, itemsize: int, *, tma: bool, heavy: bool, special: bool
) -> list[Configuration]:
    """Return the ways to compile the kernel, the best first; all have the same `queries`.

    What each becomes on sm_80 and sm_90: `python bench/machine_code.py`.

    Args:
        major: of the compute capability.
        rows: of the tiles in the list; a multiple of `queries`.
        columns: the larger of the two padded head sizes.
        tma: whether descriptors can address the tensors.
        heavy: whether scores or dropout need many registers.
        special: whether warps may be specialised.
    """
    if itemsize == 4:
        # products of float32 hold whole heads in registers
        return [Configuration(False, False, 64, 16, max(4, columns // 16), 1)]
    if columns > 128 and major < 9:
        return [Configuration(False, False, 64, keys, 8, 2) for keys in (64, 32)]
    warps = rows // 16
    # four warps of Ampere and a wide head leave few registers
    narrow = major < 9 and columns > 64 and rows == 64
    pointers = [
        Configuration(False, False, rows, keys, warps, 2)
        for keys in ((32,) if narrow else (64, 32))
    ]
    if major != 9 or not tma:
        return pointers
    plain = Configuration(True, False, rows, 64, warps, 2)
    if rows == 64:
        # to write descriptors takes as long as a short document's keys
        return [pointers[0], plain, pointers[1]]
    sizes = (64, 32) if heavy or columns > 128 else (128, 64)
    specials = [Configuration(True, True, rows, keys, 4, 2) for keys in sizes if special]
    return [*specials, plain, *pointers]


def arguments_of(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: PackedLayout, rules: Rules
) -> dict[str, Any]:
    """Return the arguments of the kernel but the tiles and those of a configuration."""
    slopes, sinks, gain = (
        None if x is None else x.contiguous() for x in (rules.alibi_slopes, rules.sinks, rules.gain)
    )
    mask = "full" if rules.full else "causal" if rules.causal else "window"
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "out_ptr": out,
        "lse_ptr": lse,
        "cu_seqlens_q_ptr": layout.cu_seqlens_q,
        "cu_seqlens_k_ptr": layout.cu_seqlens_k,
        "slopes_ptr": slopes,
        "sinks_ptr": sinks,
        "gain_ptr": gain,
        "seed_ptr": rules.seed,
        "stride_qt": q.stride(0),
        "stride_qh": q.stride(1),
        "stride_kt": k.stride(0),
        "stride_kh": k.stride(1),
        "stride_vt": v.stride(0),
        "stride_vh": v.stride(1),
        "stride_ot": out.stride(0),
        "stride_slopes": q.shape[1] if slopes is not None and slopes.ndim == 2 else 0,
        "heads": q.shape[1],
        "group": q.shape[1] // k.shape[1],
        "scale": rules.scale,
        "left": rules.left,
        "right": rules.right,
        "limit": rules.limit,
        "a": rules.a,
        "b": rules.b,
        "threshold": int(rules.dropout * 2**32) - 2**31,
        "kept_scale": 1.0 / (1.0 - rules.dropout),
        "D": q.shape[-1],
        "E": v.shape[-1],
        "BLOCK_D": padded(q.shape[-1]),
        "BLOCK_E": padded(v.shape[-1]),
        "MASK": mask,
        "TRANSFORM": rules.transform,
        "LINEAR": rules.transform == "none" and slopes is None and rules.scale > 0,
    }


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Return the result (T, H, E) in q's dtype and lse (T, H) float32."""
    q, k, v = (rows_of(x) for x in (q, k, v))
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    # tokens after the last boundary are in no tile
    out[layout.bounds_q[-1] :] = 0.0
    lse[layout.bounds_q[-1] :] = -math.inf
    arguments = arguments_of(q, k, v, out, lse, layout, rules)
    # the long documents first: the short ones fill the gaps at the end
    for tiles in reversed(layout.tiles("q", q.device, rules.causal)):
        _launch_tiles(tiles, arguments)
    return out, lse


def _launch_tiles(tiles: Tiles, arguments: dict[str, Any]) -> None:
    q, k, v = (arguments[name] for name in ("q_ptr", "k_ptr", "v_ptr"))
    at = capability(q.device)
    options = {
        "tma": all(fits_tma(x) for x in (q, k, v) if x.shape[-1]),
        "heavy": arguments["seed_ptr"] is not None or arguments["TRANSFORM"] in _HEAVY,
        # a tensor that is not loaded by descriptor is more than the compiler's pass can take
        "special": arguments["gain_ptr"] is None,
    }
    columns = max(arguments["BLOCK_D"], arguments["BLOCK_E"])
    choices = configurations(at[0], tiles.rows, columns, q.element_size(), **options)
    parts = tiles.rows // choices[0].queries
    named = arguments | {"where_ptr": tiles.where, "PARTS": parts}
    key = ("forward", at, q.dtype, tiles.rows, options["tma"], *compiled_by(arguments))
    launch(forward_kernel, len(tiles.where) * parts * q.shape[1], named, choices, key)
