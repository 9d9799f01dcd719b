"""Launching the kernels of the loss without products: sums, the labels' columns, bias."""

from typing import TYPE_CHECKING

import triton
from torch import Tensor

from . import _triton_products as products
from . import _triton_rows as by_row
from ._triton_launch import Case, block, each_row
from ._triton_tiles import ROWS

if TYPE_CHECKING:
    from ._triton_filter import Active


def finish(
    case: Case,
    rows: slice,
    results: tuple[Tensor, ...],
    sums: Tensor,
    center: Tensor,
    values: tuple[Tensor, ...] | tuple[None, ...],
    class_sum: Tensor | None,
    again: Tensor | None,
) -> None:
    """Finish the sums of rows.

    Args:
        results: loss, nll, lse, entropy and correct (T,).
        values: factor, push, rest and own (P,), which the gradients need.
        class_sum: of the class weights, where labels are smoothed.
        again: (P,) where to mark rows that are to be centred at their maximum, as `center` then is.
    """
    names = ("loss_ptr", "nll_ptr", "lse_ptr", "entropy_ptr", "correct_ptr")
    parts = [None if each is None else each[rows] for each in values]
    C = len(case.x[rows])
    arguments = dict(zip(names, results, strict=True)) | {
        "sums_ptr": sums,
        "center_ptr": center[rows],
        "again_ptr": None if again is None else again[rows],
        "logits_ptr": case.logits[rows],
        "order_ptr": case.order[rows],
        "count_ptr": case.n_valid,
        "token_ptr": case.token[rows],
        "share_ptr": case.id_weight,
        "class_sum_ptr": class_sum,
        **dict(zip(("factor_ptr", "push_ptr", "rest_ptr", "own_ptr"), parts, strict=True)),
        "first": rows.start,
        "C": C,
        "tiles": sums.shape[1],
        "pitch": sums.shape[2],
        "K": case.ids.shape[1],
        "share": case.share,
        "z_loss": case.rules.z_loss,
        "BLOCK_R": 16,
        "BLOCK_T": 64,
    }
    each_row(by_row.finish_kernel, triton.cdiv(C, 16), arguments)


def mend_labels(
    case: Case,
    rows: slice,
    e: Tensor,
    lse: Tensor,
    push: Tensor,
    *,
    scaled: Tensor | None = None,
    mode: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None] = (None, None, None),
    active: "Active | None" = None,
    offset: int = 0,
    share: float = 0.0,
) -> None:
    """Write the labels' columns of `e`, and, if wanted, x times the rows' factors to `scaled`.

    Args:
        mode: factor, rest and own (P,): `e` is in units of the factor. Without them it is the
            gradient, and the target's column is left alone.
        active: the tiles that count, to which those of the labels are added.
        offset: the first class of `e`.
        share: of each class in a smoothed label, where `e` is the gradient.
    """
    parts = [None if each is None else each[rows] for each in mode]
    x, K = case.x[rows], case.ids.shape[1]
    arguments = {
        "e_ptr": e,
        "scaled_ptr": scaled,
        "x_ptr": x,
        "order_ptr": case.order[rows],
        "count_ptr": case.n_valid,
        "ids_ptr": case.ids,
        "share_ptr": case.id_weight,
        "logits_ptr": case.logits[rows],
        "token_ptr": case.token[rows],
        "class_ptr": case.class_weight if share else None,
        "lse_ptr": lse,
        "push_ptr": push[rows],
        **dict(zip(("factor_ptr", "rest_ptr", "own_ptr"), parts, strict=True)),
        "active_ptr": None if active is None else active.flags,
        "first": rows.start,
        "offset": offset,
        "C": len(x),
        "V": e.shape[1],
        "H": x.shape[1],
        "K": K,
        "stride_e": e.stride(0),
        "stride_x": x.stride(0),
        "stride_scaled": 0 if scaled is None else scaled.stride(0),
        "stride_active": 0 if active is None else active.flags.stride(0),
        "scale": case.rules.logit_scale,
        "cap": case.rules.softcap or 1.0,
        "share": share,
        "ROWS": ROWS,
        "PIECE": 0 if active is None else active.size[1],
        "CAPPED": case.rules.softcap > 0,
        "BLOCK_K": triton.next_power_of_2(K),
        "BLOCK_H": block(x.shape[1]),
    }
    each_row(by_row.labels_kernel, len(x), arguments)


def bias_gradient(
    case: Case, rows: slice, e: Tensor, out: Tensor, *, factor: Tensor | None = None, add: bool
) -> None:
    """Write the sum over rows of factor x scale x e, or add it."""
    arguments = {
        "out_ptr": out,
        "e_ptr": e,
        "factor_ptr": None if factor is None else factor[rows],
        "count_ptr": case.n_valid,
        "first": rows.start,
        "C": len(e),
        "V": e.shape[1],
        "stride_e": e.stride(0),
        "scale": case.rules.logit_scale,
        "ADD": add,
        "BLOCK_R": 32,
        "BLOCK_V": 128,
    }
    each_row(products.bias_kernel, triton.cdiv(e.shape[1], 128), arguments)
