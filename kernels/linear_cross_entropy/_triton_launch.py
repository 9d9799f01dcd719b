"""Launching the kernels of the loss: rows in order, buffers, and the arguments of each kernel."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._common.triton_launch import capability, compiled_by, launch, processors
from .._common.triton_tiles import fits_tma
from . import _triton_exponentials as exponentials
from . import _triton_products as products
from . import _triton_rows as by_row
from ._rules import Rules
from ._triton_tiles import ROWS, Configuration, Fixed

if TYPE_CHECKING:
    from ._triton_filter import Kept


class Case(NamedTuple):
    """One call: the tensors, and the valid rows of input, one after the other."""

    x: Tensor  # (P, H), zeros after the valid rows; P is T rounded up to whole tiles
    linear_weight: Tensor  # (V, H)
    linear_bias: Tensor | None
    ids: Tensor  # (T, K)
    id_weight: Tensor  # (T, K)
    class_weight: Tensor | None
    order: Tensor  # (P,): the token of each row
    n_valid: Tensor  # (1,): how many rows are valid
    token: Tensor  # (P,): the weight of each row's loss
    logits: Tensor  # (P, K): of the labels
    target: Tensor  # (P,) int32
    rules: Rules

    @property
    def share(self) -> float:
        """The share of each class in a smoothed label."""
        return self.rules.smoothing / len(self.linear_weight)

    @property
    def stored(self) -> torch.dtype:
        """The dtype of exponentials and gradients: of 8 bits of exponent."""
        return torch.bfloat16 if self.x.dtype == torch.bfloat16 else torch.float32

    def smaller(self, first: int, size: int) -> "Case":
        """Return the classes from `first` on as if they were all."""
        part = slice(first, first + size)
        return self._replace(
            linear_weight=self.linear_weight[part],
            linear_bias=None if self.linear_bias is None else self.linear_bias[part],
            class_weight=None if self.class_weight is None else self.class_weight[part],
        )


def case_of(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    ids: Tensor,
    id_weight: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor,
    valid: Tensor,
    rules: Rules,
) -> Case:
    """Put the valid rows first, in their order; the host does not learn how many there are.

    H is a multiple of 16; rows of a weight that no wide load can read are copied.
    """
    (T, H), K = input.shape, ids.shape[1]
    P = padded(T, ROWS)
    # rows after the last token are never valid
    order = input.new_zeros(P, dtype=torch.int64)
    order[:T] = torch.argsort((~valid).to(torch.int32), stable=True)
    token = input.new_zeros(P, dtype=torch.float32)
    token[:T] = torch.where(valid, token_weight, 0.0)[order[:T]]
    weight = linear_weight.to(input.dtype)
    case = Case(
        input.new_empty(P, H),
        weight if weight.stride(0) % 16 == 0 and fits_tma(weight) else _copied(weight),
        None if linear_bias is None else linear_bias.contiguous(),
        ids.contiguous(),
        id_weight.contiguous(),
        None if class_weight is None else class_weight.contiguous(),
        order,
        valid.sum().reshape(1),
        token,
        input.new_empty(P, K, dtype=torch.float32),
        input.new_empty(P, dtype=torch.int32),
        rules,
    )
    _gather(case, input if input.stride(1) == 1 else input.contiguous())
    return case


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def padded(size: int, multiple: int) -> int:
    """Return size rounded up to whole multiples."""
    return -(-size // multiple) * multiple


def _gather(case: Case, source: Tensor) -> None:
    arguments = {
        "out_ptr": case.x,
        "x_ptr": source,
        "order_ptr": case.order,
        "count_ptr": case.n_valid,
        "w_ptr": case.linear_weight,
        "bias_ptr": case.linear_bias,
        "ids_ptr": case.ids,
        "logits_ptr": case.logits,
        "target_ptr": case.target,
        "V": len(case.linear_weight),
        "H": case.x.shape[1],
        "K": case.ids.shape[1],
        "stride_x": source.stride(0),
        "stride_w": case.linear_weight.stride(0),
        "stride_out": case.x.stride(0),
        "scale": case.rules.logit_scale,
        "cap": case.rules.softcap or 1.0,
        "CAPPED": case.rules.softcap > 0,
        "BLOCK_H": block(case.x.shape[1]),
    }
    each_row(by_row.gather_kernel, len(case.x), arguments)


def exponentials_of(
    case: Case,
    rows: slice,
    out: Tensor | None,
    center: Tensor,
    sums: Tensor,
    *,
    push: Tensor | None = None,
    again: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    offset: int = 0,
    share: float = 0.0,
) -> None:
    """Write exponentials of rows to `out` (C, V), and their sums to `sums` (S, tiles, C).

    Args:
        push: the factor of each row's softmax: `out` becomes the gradient itself.
        again: the tiles of rows that are to be done, and how many they are; else all.
        offset: the first class, where the case holds a part of them.
        share: of each class in a smoothed label, where `out` is the gradient.
    """
    x = case.x[rows]
    arguments = {
        "x_ptr": x,
        "w_ptr": case.linear_weight,
        "out_ptr": out,
        "bias_ptr": case.linear_bias,
        "class_ptr": case.class_weight if case.rules.smoothing else None,
        "center_ptr": center[rows],
        "target_ptr": case.target[rows],
        "push_ptr": None if push is None else push[rows],
        "token_ptr": case.token[rows],
        "sums_ptr": sums,
        "count_ptr": case.n_valid,
        "again_ptr": again[0],
        "again_count_ptr": again[1],
        "first": rows.start,
        "offset": offset,
        "C": len(x),
        "V": len(case.linear_weight),
        "H": x.shape[1],
        "stride_x": x.stride(0),
        "stride_w": case.linear_weight.stride(0),
        "stride_out": 0 if out is None else out.stride(0),
        "pitch": sums.shape[2],
        "scale": case.rules.logit_scale,
        "cap": case.rules.softcap or 1.0,
        "share": share,
        # far below any logit, and finite: 0 times it is 0. not a constant: the compiler would
        # take the exponential of both sides of the choice
        "nothing": -1.0e30,
        "STATISTICS": push is None,
        "CAPPED": case.rules.softcap > 0,
        "SMOOTH": case.rules.smoothing > 0,
    }
    choices = exponential_choices(case)
    arguments["PIECE"] = choices[0].piece
    tiles = triton.cdiv(len(x), choices[0].rows) * triton.cdiv(arguments["V"], choices[0].columns)
    _products(exponentials.exponentials_kernel, tiles, arguments, choices)


def exponential_choices(case: Case) -> list[Configuration]:
    """Return the configurations of the first product; all have the same tiles."""
    tma = fits_tma(case.linear_weight)
    capped, smooth = case.rules.softcap > 0, case.rules.smoothing > 0
    after = 2 + smooth if capped else int(smooth or case.linear_bias is not None)
    return exponentials.configurations(capability(case.x.device)[0], tma=tma, after=after)


def pieces(case: Case) -> int:
    """Return how many sums there are of each row."""
    tile = exponential_choices(case)[0]
    return triton.cdiv(len(case.linear_weight), tile.columns) * (tile.columns // tile.piece)


def input_gradient(
    case: Case,
    rows: slice,
    e: Tensor,
    out: Tensor,
    *,
    factor: Tensor | None = None,
    dense: Tensor | None = None,
    kept: "Kept | None" = None,
    add: bool = False,
) -> None:
    """Write factor x scale x (e @ W) - weight x scale x dense to the rows' tokens, or add it."""
    arguments = {
        "out_ptr": out,
        "e_ptr": e,
        "w_ptr": case.linear_weight,
        "order_ptr": case.order[rows],
        "count_ptr": case.n_valid,
        "factor_ptr": None if factor is None else factor[rows],
        "token_ptr": case.token[rows],
        "dense_ptr": dense,
        "first": rows.start,
        "C": len(e),
        "V": e.shape[1],
        "H": out.shape[1],
        "stride_e": e.stride(0),
        "stride_w": case.linear_weight.stride(0),
        "stride_out": out.stride(0),
        "scale": case.rules.logit_scale,
        "ADD": add,
        "PRECISION": _precision(case),
        **_filter(kept),
    }
    choices = _product_choices(e, case.linear_weight, listed=kept is not None)
    tiles = triton.cdiv(len(e), choices[0].rows) * triton.cdiv(out.shape[1], choices[0].columns)
    _products(products.input_kernel, tiles, arguments, choices)


def weight_gradient(
    case: Case,
    rows: slice,
    e: Tensor,
    x: Tensor,
    out: Tensor,
    *,
    kept: "Kept | None" = None,
    add: bool,
) -> None:
    """Write e.T @ x, or add it."""
    arguments = {
        "out_ptr": out,
        "e_ptr": e,
        "x_ptr": x,
        "count_ptr": case.n_valid,
        "first": rows.start,
        "C": len(e),
        "V": e.shape[1],
        "H": out.shape[1],
        "stride_e": e.stride(0),
        "stride_x": x.stride(0),
        "stride_out": out.stride(0),
        "ADD": add,
        "PRECISION": _precision(case),
        **_filter(kept),
    }
    choices = _product_choices(e, x, listed=kept is not None)
    tiles = triton.cdiv(e.shape[1], choices[0].rows) * triton.cdiv(out.shape[1], choices[0].columns)
    _products(products.weight_kernel, tiles, arguments, choices)


def _filter(kept: "Kept | None") -> dict[str, Any]:
    if kept is None:
        return {"kept_ptr": None, "counts_ptr": None, "stride_kept": 0, "KEPT": 0}
    tiles, counts, size = kept
    return {"kept_ptr": tiles, "counts_ptr": counts, "stride_kept": tiles.stride(0), "KEPT": size}


def _precision(case: Case) -> str:
    return "ieee" if case.x.dtype == torch.float32 else "tf32"


def _product_choices(e: Tensor, other: Tensor, *, listed: bool) -> list[Configuration]:
    tma = fits_tma(e) and fits_tma(other)
    return products.configurations(
        capability(e.device)[0], e.element_size(), tma=tma, listed=listed
    )


def block(size: int) -> int:
    return min(1024, triton.next_power_of_2(size))


def _products(
    kernel: Any, tiles: int, arguments: dict[str, Any], choices: list[Configuration]
) -> None:
    x = next(each for each in arguments.values() if isinstance(each, Tensor))
    dtypes = [each.dtype for each in arguments.values() if isinstance(each, Tensor)]
    key = (kernel.__name__, x.device, *dtypes, len(choices), *compiled_by(arguments))
    launch(kernel, min(tiles, processors(x.device)), arguments, choices, key)


def each_row(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    launch(kernel, programs, arguments, [Fixed(4)], ())
