"""What each token is compared with, how much it counts, and what the sum is divided by."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._common.labelled_rows import positive

Lookup = Callable[[Tensor, Tensor], Tensor]


class Targets(NamedTuple):
    """Labels of T tokens, as the ops take them."""

    ids: Tensor  # (T, K) int64, the target first
    id_weight: Tensor  # (T, K)
    token_weight: Tensor  # (T,), 0 where ignored, not divided yet
    denominator: Tensor  # scalar, positive


def targets(
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    soft: tuple[Tensor, Tensor] | None,
    *,
    ignore_index: int,
    smoothing: float,
    divide: bool,
    num_items: float | Tensor | None,
    dtype: torch.dtype,
    lookup: Lookup,
) -> Targets:
    """Return the labels of flat targets (T,); lookup(weight, ids) reads the class weights."""
    valid = target != ignore_index  # (T,)
    each = torch.ones_like(target, dtype=dtype) if token_weight is None else token_weight
    ids, share = _shares(target, soft, dtype)
    of_ids = torch.ones_like(share) if weight is None else lookup(weight, ids).to(dtype)
    total = torch.where(valid, of_ids[:, 0], 0.0).sum() if num_items is None else num_items
    return Targets(
        ids,
        (1 - smoothing) * share * of_ids,
        torch.where(valid, each.reshape(-1).to(dtype), 0.0),
        positive(total if divide else 1.0, valid.device, dtype),
    )


def at_ids(weight: Tensor, ids: Tensor) -> Tensor:
    """Return the class weights of the ids; of ids that will be refused or ignored, any."""
    return weight[ids.clamp(0, len(weight) - 1)]


def _shares(
    target: Tensor, soft: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the ids (T, K) and how the label's 1 is shared among them."""
    if soft is None:
        return target[:, None], torch.ones_like(target, dtype=dtype)[:, None]
    shape = (len(target), soft[0].shape[-1])
    soft_ids, share = soft[0].reshape(shape), soft[1].reshape(shape).to(dtype)  # (T, S)
    # a soft label that is the target joins it: the target's terms keep every digit
    joins = soft_ids == target[:, None]
    share = torch.where(joins, 0.0, share)
    left = 1 - share.sum(1, keepdim=True)
    return torch.cat([target[:, None], soft_ids], 1), torch.cat([left, share], 1)
