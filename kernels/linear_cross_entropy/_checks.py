"""Checks of the loss's arguments; every message names the argument and the way out."""

import math

import torch
from torch import Tensor

from .._common.labelled_rows import DTYPES
from .._common.shapes import bind_shapes


def numbers(label_smoothing: float, z_loss: float, softcap: float | None, scale: float) -> None:
    """Refuse numbers that no loss is made of."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in 0 .. 1, got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be a finite number >= 0, got {z_loss}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a finite number > 0, or None for none, got {softcap}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"logit_scale must be a finite number, got {scale}")


def choices(reduction: str, impl: str, grouped: bool) -> None:
    """Refuse names that do not exist."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if impl not in DTYPES:
        raise ValueError(f"impl must be 'fused' or 'reference', got {impl!r}")
    if grouped and impl == "reference":
        raise ValueError("impl='reference' takes no process_group; use impl='fused'")


def operands(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    impl: str,
) -> None:
    """Refuse tensors whose shapes, dtypes or devices disagree."""
    named = {
        "input": input,
        "linear_weight": linear_weight,
        "linear_bias": linear_bias,
        "weight": weight,
    }
    present = {name: tensor for name, tensor in named.items() if tensor is not None}
    for name, tensor in present.items():
        if hasattr(tensor, "full_tensor"):
            raise NotImplementedError(f"{name} is sharded (a DTensor); pass {name}.full_tensor()")
    if input.ndim < 1 or input.shape[:-1] != target.shape:
        raise ValueError(
            f"target must have input's shape without the last axis, got target "
            f"{tuple(target.shape)} and input {tuple(input.shape)}"
        )
    rows = (input.reshape(-1, input.shape[-1]), "T H")
    vectors = {name: (present[name], "V") for name in ("linear_bias", "weight") if name in present}
    bind_shapes(linear_weight=(linear_weight, "V H"), input=rows, **vectors)
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}; use target.long()")
    _same_device(input, target=target, **present)
    for name in ("input", "linear_weight", "linear_bias"):
        if name in present and present[name].dtype not in DTYPES[impl]:
            raise ValueError(
                f"{name} is {present[name].dtype}; impl='fused' takes float32, bfloat16 and "
                "float16, impl='reference' also float64"
            )
    _constant("weight", weight)


def shares(
    target: Tensor,
    token_weight: Tensor | None,
    soft_ids: Tensor | None,
    soft_weights: Tensor | None,
) -> None:
    """Refuse weights and soft labels that do not belong to the targets."""
    if token_weight is not None and token_weight.shape != target.shape:
        raise ValueError(
            f"token_weight must have target's shape {tuple(target.shape)}, got "
            f"{tuple(token_weight.shape)}"
        )
    _constant("token_weight", token_weight)
    _constant("soft_weights", soft_weights)
    if (soft_ids is None) != (soft_weights is None):
        raise ValueError("soft_ids and soft_weights go together; one of them is None")
    named = {"token_weight": token_weight, "soft_ids": soft_ids, "soft_weights": soft_weights}
    _same_device(target, **{name: tensor for name, tensor in named.items() if tensor is not None})
    if soft_ids is None or soft_weights is None:
        return
    fits = soft_ids.ndim == target.ndim + 1 and soft_ids.shape[:-1] == target.shape
    if soft_ids.shape != soft_weights.shape or not fits:
        raise ValueError(
            f"soft_ids and soft_weights must have target's shape {tuple(target.shape)} and one "
            f"more axis, got {tuple(soft_ids.shape)} and {tuple(soft_weights.shape)}"
        )
    if soft_ids.dtype != torch.int64:
        raise ValueError(f"soft_ids must be int64, got {soft_ids.dtype}; use soft_ids.long()")


def _same_device(first: Tensor, **others: Tensor) -> None:
    wrong = {name: t.device for name, t in others.items() if t.device != first.device}
    if wrong:
        raise ValueError(
            f"all tensors must be on one device, got {first.device} and "
            + ", ".join(f"{name} on {device}" for name, device in wrong.items())
        )


def _constant(name: str, tensor: Tensor | None) -> None:
    if tensor is None:
        return
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} gets no gradient; pass {name}.detach()")
