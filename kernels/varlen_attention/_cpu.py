"""The C++ kernels of the CPU: one in float32 for every rule, one for bfloat16 matrix units."""

import math

import torch
from torch import Tensor

from .._common import native
from ._layout import PackedLayout
from ._rules import Rules
from ._scores import unseeing_rows

_TRANSFORMS = {"none": 0, "softcap": 1, "softplus": 2, "power": 3}


def takes(q: Tensor, v: Tensor, rules: Rules) -> bool:
    """Return whether this can compute attention of q, and faster than torch's own kernel."""
    known = q.device.type == "cpu" and q.dtype != torch.float64 and native.loaded()
    # torch has this in wider vectors than the baseline: 2.8 and 1.9 times as fast, full and causal
    # (64 documents, 19,709 tokens, 8 heads of 64 channels, float32, one thread, 2026-11-21)
    torchs = rules.plain and (rules.full or rules.causal)
    return known and not (torchs and torch.ops.apical.cpu_isa() == "baseline")


def _has_matrix_units(q: Tensor, rules: Rules) -> bool:
    # AMX: bfloat16 alone, and scores that are no more than masked products
    simple = rules._replace(sinks=None).plain
    return q.dtype == torch.bfloat16 and simple and torch.ops.apical.amx_supported()


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Return the result (T, H, E) in q's dtype and lse (T, H), -inf where a row sees no key."""
    table = layout.table(rules.right)
    out = _outside_zero(q, table[:, :2], size=v.shape[2])
    lse = q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
    q, k, v = _by_channel(q, k, v)
    sinks, mask = _wide(rules.sinks), (rules.left, rules.right, rules.limit)
    if _has_matrix_units(q, rules):
        torch.ops.apical.varlen_attention_amx_forward(
            q, k, v, table, sinks, rules.scale, *mask, out, lse
        )
    else:
        torch.ops.apical.varlen_attention_cpu_forward(
            q, k, v, table, _wide(rules.alibi_slopes), sinks, _wide(rules.gain), rules.scale,
            *mask, *_numbers(rules), out, lse,
        )  # fmt: skip
    return out, unseeing_rows(lse, layout.bounds_q[-1], rules)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: PackedLayout,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v and the gain, from the saved result and lse."""
    table = layout.table(rules.right)
    grad_q = _outside_zero(q, table[:, :2])
    grad_k, grad_v = (_outside_zero(x, table[:, 2:4]) for x in (k, v))
    grad_gain = None if rules.gain is None else lse.new_zeros(lse.shape)
    grad_out, q, k, v = _by_channel(grad_out, q, k, v)
    grad_lse, mask = _wide(grad_lse), (rules.left, rules.right, rules.limit)
    if _has_matrix_units(q, rules):
        torch.ops.apical.varlen_attention_amx_backward(
            grad_out, grad_lse, q, k, v, out, lse, table, rules.scale, *mask, grad_q, grad_k, grad_v
        )
    else:
        torch.ops.apical.varlen_attention_cpu_backward(
            grad_out, grad_lse, q, k, v, out, lse, table, _wide(rules.alibi_slopes),
            _wide(rules.gain), rules.scale, *mask, *_numbers(rules), grad_q, grad_k, grad_v,
            grad_gain,
        )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_gain


def _numbers(rules: Rules) -> tuple[float | int, ...]:
    seed = 0 if rules.seed is None else int(rules.seed)
    return _TRANSFORMS[rules.transform], rules.a, rules.b, rules.dropout, seed


def _wide(numbers: Tensor | None) -> Tensor | None:
    return None if numbers is None else numbers.float().contiguous()


def _outside_zero(like: Tensor, ranges: Tensor, size: int | None = None) -> Tensor:
    # where documents cover all rows, the kernel writes all of them
    covered = int(ranges.diff().sum()) == like.shape[0]
    new = like.new_empty if covered else like.new_zeros
    return new(*like.shape[:2], like.shape[2] if size is None else size)


def _by_channel(*tensors: Tensor) -> list[Tensor]:
    # tokens and heads may lie anywhere, channels one after the other
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
