"""Attention that is two calls of the operation: the Lambda mask, and softplus re-weighted."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._rules import UNBOUNDED, Rules

Attend = Callable[[Tensor, Tensor, Tensor, Rules], tuple[Tensor, Tensor]]

# keys up to which re-weighting has no offset: it is 0 in the first three rows of the paper's matrix
_FEW = 3


def lambda_attention(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    cu_q: Tensor,
    global_tokens: int,
    q_global: Tensor | None,
    k_global: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return attention to a causal window and to the first tokens of the document, and its lse.

    Query i sees key j <= i if i - j <= left or j < global_tokens: one softmax over both. Beyond the
    window, scores are of q_global and k_global, where they are given.

    Source: Han et al. 2023, LM-Infinite, arXiv:2308.16137: the Lambda-shaped mask and the distance
    limit, whose second pair is queries rotated to one fixed distance and keys not rotated.
    """
    near = attend(q, k, v, rules)
    distance = rules.left + 1
    beyond = rules._replace(left=UNBOUNDED, right=-distance, limit=global_tokens, sinks=None)
    if q_global is None and k_global is None:
        return _merge(*near, *attend(q, k, v, beyond))
    far, lse = attend(
        q if q_global is None else q_global,
        k if k_global is None else k_global,
        v,
        beyond._replace(alibi_slopes=None),
    )
    if rules.alibi_slopes is not None:
        # all of them at one distance: a bias of the row, which its softmax does not see
        lse = lse - distance * _slopes_of_rows(rules.alibi_slopes, cu_q, rows=len(q))
    return _merge(*near, far, lse)


def _slopes_of_rows(slopes: Tensor, cu_q: Tensor, *, rows: int) -> Tensor:
    # (H,), or (T, H) for slopes of documents; tokens after the last of them have none
    if slopes.ndim == 1:
        return slopes
    row = torch.arange(rows, device=slopes.device, dtype=cu_q.dtype)
    document = torch.searchsorted(cu_q.to(slopes.device)[1:], row, right=True)
    return torch.nn.functional.pad(slopes, (0, 0, 0, 1))[document]


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    pair = torch.stack((lse, other_lse), -1)
    # rows that see no key on either side: inf - inf has no gradient
    dead = (pair == -math.inf).all(-1)
    pair = pair.masked_fill(dead[..., None], 0.0)
    # softmax of rows: torch's logaddexp has other bits at the end of a vector than inside
    share, other_share = pair.softmax(-1)[..., None].unbind(2)
    merged = (share * out + other_share * other).to(out.dtype)
    both = pair.amax(-1) - pair.log_softmax(-1).amax(-1)
    return merged, both.masked_fill(dead, -math.inf)


def softplus_attention(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    cu_q: Tensor,
    cu_k: Tensor | None,
    own_scores: bool,
    reweight: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    """Return attention with weights softplus(x_ij) / sum_j softplus(x_ij), and the log of the sum.

    With its own scores, x_ij = log(D) log(n_i) cos(q_i, k_j), where query i sees n_i keys.
    With ``reweight`` = (power, offset) these weights A are a first stage, of a second:
    relu(n_i A_ij - offset) ** power, normalised. Queries that see at most three keys have no
    offset: the only weight of the first is 1, and would be 0.

    Source: Gao, Spratling and Gionfrida 2025, arXiv:2501.13428 (LSSA; re-weighted: LSSAR).
    """
    visible = visible_keys(q, cu_q, cu_k, rules).to(torch.promote_types(q.dtype, torch.float32))
    if own_scores:
        factor = visible.clamp(min=1).log() * math.log(q.shape[2])
        end = (cu_q if cu_k is None else cu_k)[-1].to(k.device)
        in_documents = torch.arange(len(k), device=k.device) < end
        q = (_directions(q, visible > 0) * factor[:, None, None]).to(q.dtype)
        k, rules = _directions(k, in_documents).to(k.dtype), rules._replace(scale=1.0)
    if reweight is None:
        return attend(q, k, v, rules._replace(transform="softplus"))
    # no values: of the first stage only the sums are wanted
    first = rules._replace(transform="softplus", seed=None, dropout=0.0)
    _, log_sum = attend(q, k, v[..., :0], first)
    # rows that see no key need some finite number
    gain = visible[:, None] * (-log_sum.masked_fill(log_sum == -math.inf, 0.0)).exp()
    power, offset = reweight
    second = rules._replace(transform="power", gain=gain, a=float(power), b=float(offset))
    return _with_offset_beyond(_FEW, attend, q, k, v, second, visible)


def _directions(x: Tensor, rows: Tensor) -> Tensor:
    # other rows may hold anything, and get gradient 0
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.nn.functional.normalize(wide.masked_fill(~rows[:, None, None], 0.0), dim=-1)


def _with_offset_beyond(
    few: int, attend: Attend, q: Tensor, k: Tensor, v: Tensor, rules: Rules, visible: Tensor
) -> tuple[Tensor, Tensor]:
    # `check_reweight` has it that queries which see few keys see the first ones of their document
    without = rules._replace(b=0.0)
    if rules.left + rules.right < few:
        return attend(q, k, v, without)
    done = attend(q, k, v, rules)
    if rules.b == 0.0:
        return done
    at_start = attend(q, k, v, without._replace(left=UNBOUNDED, limit=few))
    sees_few = (visible <= few)[:, None]
    out = torch.where(sees_few[..., None], at_start[0], done[0])
    return out, torch.where(sees_few, at_start[1], done[1])


def visible_keys(q: Tensor, cu_q: Tensor, cu_k: Tensor | None, rules: Rules) -> Tensor:
    """Return how many keys each query sees, (T,) float32 on q's device; 0 after the last boundary.

    Worked out on the device of the boundaries, which are not waited for.
    """
    cu_q = cu_q.to(q.device, torch.int64)
    cu_k = cu_q if cu_k is None else cu_k.to(q.device, torch.int64)
    row = torch.arange(q.shape[0], device=q.device)
    document = torch.searchsorted(cu_q, row, right=True).clamp(max=len(cu_q) - 1)
    end_q, end_k = cu_q[document], cu_k[document]
    keys = end_k - cu_k[document - 1]
    # counted from the bottom right
    place = keys - (end_q - row)
    first = (place - rules.left).clamp(min=0)
    last = torch.minimum(place + rules.right, keys - 1)
    return (last - first + 1).clamp(min=0).masked_fill(row >= cu_q[-1], 0).float()
