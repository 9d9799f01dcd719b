"""Losses of labelled rows: their checks, their chunks of rows, and what a mean divides by."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .shapes import bind_shapes

# bytes of float32 logits at a time, and the rows that this may mean: fewer make the matrix
# products slow, more make the softmax pass read from further away (bench/linear_cross_entropy.py)
_CHUNK_BYTES = 48e6
_CHUNK_ROWS = (256, 1024)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_options(
    reduction: str, reductions: tuple[str, ...], num_items: float | Tensor | None, impl: str
) -> None:
    """Raise ValueError unless the options that all these losses share make sense together."""
    if reduction not in reductions:
        raise ValueError(f"reduction must be one of {reductions}, got {reduction!r}")
    if impl not in ("fused", "reference"):
        raise ValueError(f"impl must be 'fused' or 'reference', got {impl!r}")
    check_items(num_items, reduction)


def check_items(num_items: float | Tensor | None, reduction: str) -> None:
    """Raise ValueError unless "mean" can divide by num_items."""
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items is what 'mean' divides by; reduction is {reduction!r}")
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(f"num_items must be one number, got shape {tuple(num_items.shape)}")
    if not isinstance(num_items, Tensor) and num_items < 0:
        raise ValueError(f"num_items must be a count of tokens, got {num_items}")


def check_tensors(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor,
    impl: str,
    **others: tuple[Tensor, str],
) -> None:
    """Raise unless input (..., H), linear_weight (V, H), target (...) and others fit together.

    Args:
        impl: "reference" takes float64 too.
        others: more floating-point tensors by name, each with its shape, as in ``bind_shapes``.
    """
    named = {"input": input, "linear_weight": linear_weight}
    named |= {name: tensor for name, (tensor, _) in others.items()}
    refuse_sharded(**named)
    if input.ndim < 1 or input.shape[:-1] != target.shape:
        raise ValueError(
            f"target must have input's shape without the last axis, got target "
            f"{tuple(target.shape)} and input {tuple(input.shape)}"
        )
    rows = input.reshape(-1, input.shape[-1])
    bind_shapes(linear_weight=(linear_weight, "V H"), input=(rows, "T H"), **others)
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}; use target.long()")
    check_devices(input, target=target, **named)
    allowed = (*_DTYPES, torch.float64) if impl == "reference" else _DTYPES
    for name, tensor in named.items():
        if tensor.dtype not in allowed:
            raise ValueError(
                f"{name} is {tensor.dtype}; impl='fused' takes float32, bfloat16 and float16, "
                "impl='reference' also float64"
            )


def refuse_sharded(**named: Tensor) -> None:
    """Raise NotImplementedError where a tensor is a DTensor."""
    for name, tensor in named.items():
        if hasattr(tensor, "full_tensor"):
            raise NotImplementedError(f"{name} is sharded (a DTensor); pass {name}.full_tensor()")


def check_devices(first: Tensor, **others: Tensor) -> None:
    """Raise ValueError unless all are on the first one's device."""
    wrong = {name: t.device for name, t in others.items() if t.device != first.device}
    if wrong:
        raise ValueError(
            f"all tensors must be on one device, got {first.device} and "
            + ", ".join(f"{name} on {device}" for name, device in wrong.items())
        )


def check_labels(ids: Tensor, valid: Tensor, vocabulary: int) -> None:
    """Raise where a valid label is not in 0 .. V - 1; only on the CPU, elsewhere it would wait.

    Shapes: ids (T, K), the target first and soft labels behind it; valid (T,).
    """
    if ids.device.type != "cpu":
        return
    wrong = ((ids < 0) | (ids >= vocabulary)) & valid[:, None]
    if not wrong.any():
        return
    row, column = wrong.nonzero()[0].tolist()
    name = "soft_ids holds" if column else "target holds"
    raise ValueError(
        f"{name} the label {ids[row, column].item()}, but linear_weight has V={vocabulary} rows; "
        f"expected 0 <= label < {vocabulary}, or a target of ignore_index"
    )


def denominator_of(valid: Tensor, reduction: str, num_items: float | Tensor | None) -> Tensor:
    """Return what the sum of the losses is divided by: a float32 scalar, positive."""
    total = valid.sum() if num_items is None else num_items
    return positive(total if reduction == "mean" else 1, valid.device, torch.float32)


def positive(value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the value to divide by as a scalar; 1 for 0, where the sum is 0 as well."""
    value = torch.as_tensor(value, device=device).reshape(()).to(dtype)
    return torch.where(value > 0, value, 1.0)


def row_chunks(rows: Tensor, V: int) -> Iterator[Tensor]:
    """Yield the rows in order, in chunks of equal size up to one."""
    low, high = _CHUNK_ROWS
    size = min(max(round(_CHUNK_BYTES / (4 * V)), low), high)
    count = -(-len(rows) // size)
    # the first chunk is the largest: the others reuse its buffers
    yield from rows.tensor_split(count) if count else ()
