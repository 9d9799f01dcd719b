"""Checks of the product's arguments; every message names the argument and the way out."""

import math

import torch
from torch import Tensor

from .._common.labelled_rows import check_devices, refuse_sharded
from .._common.shapes import bind_shapes
from .support import Support

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(
    input: Tensor,  # noqa: A002
    a: Tensor,
    b: Tensor,
    values: Tensor,
    bias: Tensor | None,
    support: Support,
    impl: str,
) -> None:
    """Refuse tensors whose shapes, dtypes or devices disagree, and an unknown implementation."""
    if impl not in ("fused", "reference"):
        raise ValueError(f"impl must be 'fused' or 'reference', got {impl!r}")
    others = {"a": a, "b": b, "values": values} | ({} if bias is None else {"bias": bias})
    refuse_sharded(input=input, **others)
    _shapes(input, a, b, values, bias, support)
    check_devices(input, **others)
    allowed = (*_DTYPES, torch.float64) if impl == "reference" else _DTYPES
    if input.dtype not in allowed:
        raise ValueError(
            f"input is {input.dtype}; impl='fused' takes float32, bfloat16 and float16, "
            "impl='reference' also float64"
        )
    for name, tensor in others.items():
        if tensor.dtype != input.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} and input {input.dtype}; cast one, or use autocast"
            )


def scale(number: float) -> None:
    """Refuse a factor that no product has."""
    if not -math.inf < number < math.inf:
        raise ValueError(f"scale must be a finite number, got {number}")


def _shapes(
    input: Tensor,  # noqa: A002
    a: Tensor,
    b: Tensor,
    values: Tensor,
    bias: Tensor | None,
    support: Support,
) -> None:
    if input.ndim < 1:
        raise ValueError("input must have shape (..., m), got a scalar; give it an axis")
    named = {"a": (a, "R m"), "b": (b, "n R"), "values": (values, "S")}
    named |= {} if bias is None else {"bias": (bias, "n")}
    size = bind_shapes(**named)
    if input.shape[-1] != size["m"]:
        raise ValueError(
            f"input has {input.shape[-1]} features and a, (R, m), has m={size['m']}; "
            "the last axis of input is what a multiplies"
        )
    if size["R"] == 0:
        raise ValueError("a and b have rank R=0; a product needs a rank of at least 1")
    if (size["n"], size["m"]) != (support.out_features, support.in_features):
        raise ValueError(
            f"support is for {support.out_features} x {support.in_features} (out x in), but b and "
            f"a make {size['n']} x {size['m']}; make the support for that shape"
        )
    if size["S"] != support.stored:
        raise ValueError(
            f"values has {size['S']} entries and the support stores {support.stored}; "
            "pass one value per stored entry"
        )
