"""Which entries a mask stores: drawn from a seed, or the largest."""

from typing import Literal

import torch
from torch import Tensor

from apical.kernels.sparse_low_rank import Support

# a mask from elsewhere has no seed to be drawn from: all entries, until it is set or loaded
MaskKind = Literal["uniform", "regular", "grouped", "nm", "explicit"]


def mask_support(
    shape: tuple[int, int],
    kind: MaskKind,
    sparsity: float | None,
    seed: int,
    block: tuple[int, int] | None,
) -> Support | None:
    """Return what a mask is drawn from, and None for one that is given.

    Raises:
        ValueError: an argument is out of its range.
    """
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; expected a share, 0 <= sparsity < 1")
    if kind == "explicit":
        return None
    rows, columns = block or (0, 0)  # the support's default
    if kind == "nm":
        few, many = block or (2, 4)
        _check_of(shape[1], few, many, sparsity)
        return Support("nm", *shape, few / many, seed, block=(rows, columns))
    if sparsity is None:
        raise ValueError("sparsity is missing; expected the masked share, such as 0.75")
    return Support(kind, *shape, without_noise(sparsity), seed, block=(rows, columns))


def largest(weight: Tensor, support: Support) -> Tensor:
    """Return the mask (n, m) of as many entries as a support stores, where it could store them.

    The largest by magnitude: of the whole weight for `uniform`, of each row for `regular`, n of
    every m for `nm`. The first ones are taken where they are equal.
    """
    groups = {"uniform": 1, "regular": support.out_features}
    many = support.block[1] if support.kind == "nm" else 0
    each = weight.reshape(weight.numel() // many if many else groups[support.kind], -1)
    order = each.abs().argsort(dim=1, descending=True, stable=True)
    kept = support.stored // len(each)
    mask = torch.zeros_like(each, dtype=torch.bool).scatter_(1, order[:, :kept], True)
    return mask.view(weight.shape)


def without_noise(share: float) -> float:
    """Return 1 - share, of which the last digits are not meant."""
    # 1 - 0.9 is a little less than a tenth
    return round(1 - share, 12)


def _check_of(columns: int, few: int, many: int, sparsity: float | None) -> None:
    if not 0 < few <= many:
        raise ValueError(f"block is {(few, many)}; expected (n, m) of nm, 0 < n <= m")
    if columns % many:
        nearest = [size for size in (columns - columns % many, columns + -columns % many) if size]
        raise ValueError(
            f"in_features is {columns}, which {many} of block={few, many} does not divide; the "
            f"nearest it does: {' and '.join(map(str, nearest))}. Pass another block or support"
        )
    if sparsity is not None and abs(1 - sparsity - few / many) > 1e-9:
        raise ValueError(
            f"sparsity is {sparsity} and block={few, many} masks {1 - few / many}; pass None"
        )
