"""Checks of the product's arguments; every message names the argument and the way out."""

import torch
from torch import Tensor

from .._common.labelled_rows import refuse_sharded
from .._common.shapes import bind_shapes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(
    input: Tensor,  # noqa: A002
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    impl: str,
) -> None:
    """Refuse tensors whose shapes, dtypes or devices disagree, and an unknown implementation."""
    if impl not in ("fused", "reference"):
        raise ValueError(f"impl must be 'fused' or 'reference', got {impl!r}")
    others = {"first": first, "second": second} | ({} if bias is None else {"bias": bias})
    refuse_sharded(input=input, **others)
    _shapes(input, first, second, bias)
    allowed = (*_DTYPES, torch.float64) if impl == "reference" else _DTYPES
    if input.dtype not in allowed:
        raise ValueError(
            f"input is {input.dtype}; impl='fused' takes float32, bfloat16 and float16, "
            "impl='reference' also float64"
        )
    for name, tensor in others.items():
        if tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device} and input on {input.device}; move one")
        if tensor.dtype != input.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} and input {input.dtype}; cast one, or use autocast"
            )


def _shapes(
    input: Tensor,  # noqa: A002
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
) -> None:
    if input.ndim < 1:
        raise ValueError("input must have shape (..., m), got a scalar; give it an axis")
    size = bind_shapes(first=(first, "r jk s"), second=(second, "k p rj"))
    for name, tensor in (("first", first), ("second", second)):
        if not tensor.numel():
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; no axis may be empty")
    m, n = size["r"] * size["s"], size["k"] * size["p"]
    if size["jk"] % size["k"] or size["jk"] // size["k"] * size["r"] != size["rj"]:
        raise ValueError(
            f"first {tuple(first.shape)} and second {tuple(second.shape)} do not fit together; "
            "expected (r, j k, s) and (k, p, r j) with the same r, j and k"
        )
    if input.shape[-1] != m:
        raise ValueError(
            f"input has {input.shape[-1]} features and first, (r, j k, s), takes r s = {m}"
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} and second, (k, p, r j), makes {n} features"
        )
