"""Checks of the loss's arguments; every message names the argument and the way out."""

import math

import torch
from torch import Tensor

from .._common import labelled_rows as rows
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
    if impl not in ("fused", "filtered", "reference"):
        raise ValueError(f"impl must be 'fused', 'filtered' or 'reference', got {impl!r}")
    if grouped and impl != "fused":
        raise ValueError(f"impl={impl!r} takes no process_group; use impl='fused'")


def operands(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    impl: str,
) -> None:
    """Refuse tensors whose shapes, dtypes or devices disagree."""
    bias = {} if linear_bias is None else {"linear_bias": (linear_bias, "V")}
    rows.check_tensors(input, linear_weight, target, impl, **bias)
    if weight is None:
        return
    rows.refuse_sharded(weight=weight)
    bind_shapes(linear_weight=(linear_weight, "V H"), weight=(weight, "V"))
    rows.check_devices(input, weight=weight)
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
    rows.check_devices(
        target, **{name: tensor for name, tensor in named.items() if tensor is not None}
    )
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


def _constant(name: str, tensor: Tensor | None) -> None:
    if tensor is None:
        return
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} gets no gradient; pass {name}.detach()")
