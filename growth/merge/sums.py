"""The sum that every merge is: coefficients times tensors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def combine(reads: Sequence[Callable[[], Tensor]], coefficients: Sequence[float]) -> Tensor:
    """Return sum of c_i * tensor_i, in the dtype and on the device of the first tensor.

    It is (sum of c_i) * reference + sum of c_i * (tensor_i - reference), where the reference is the
    first with a coefficient: equal tensors give themselves, and models that are near each other
    lose nothing to rounding. Coefficients of 0 leave a model out, and one that is alone with
    coefficient 1 is copied bit for bit.

    Precision: sums in float32, or in float64 where a tensor is, rounded once.

    Args:
        reads: each returns a tensor of the same shape; they are called one by one.
        coefficients: one per tensor.

    Source: ours.
    """
    used = [(read, c) for read, c in zip(reads, coefficients, strict=True) if c]
    first = reads[0]()
    reference = first if used and used[0][0] is reads[0] else used[0][0]() if used else first
    if len(used) == 1 and used[0][1] == 1:
        return reference.to(first.device, first.dtype, copy=True)
    total = reference.to(first.device, _accumulator(reference), copy=True).mul_(
        _total(coefficients)
    )
    for read, c in used[1:]:
        other = read().to(first.device)
        total = total.to(torch.promote_types(total.dtype, _accumulator(other)))
        total.add_(other.to(total.dtype, copy=True).sub_(reference.to(total.device)), alpha=c)
    return total.to(first.dtype)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _total(coefficients: Sequence[float]) -> float:
    total = sum(coefficients)
    # shares such as 1/3 sum to 1 but for rounding, which equal tensors should not show
    return 1.0 if abs(total - 1) < 1e-12 else total
