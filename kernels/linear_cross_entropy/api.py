"""The public function: checks its arguments, chooses the implementation, binds the gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._common.shapes import bind_shapes
from . import ops

_DTYPES = {
    "fused": (torch.float32, torch.bfloat16, torch.float16),
    "reference": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
}


class LinearCrossEntropyOutput(NamedTuple):
    """The loss to differentiate, and its parts, detached."""

    loss: Tensor  # scalar, or (T,) for reduction="none"
    nll: Tensor  # (T,)
    lse: Tensor  # (T,)
    z: Tensor  # scalar


def linear_cross_entropy(
    input: Tensor,  # noqa: A002 - torch's own name
    linear_weight: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    z_loss: float = 0.0,
    num_items: int | Tensor | None = None,
    impl: str = "fused",
) -> LinearCrossEntropyOutput:
    """Return the cross-entropy of ``input @ linear_weight.T`` without keeping the logits.

    Shapes: input (..., H), taken as (T, H); linear_weight (V, H); target (...) int64; loss a
    scalar, or (T,) for reduction "none"; nll, lse (T,), 0 where ignored; z a scalar.
    Precision: logits, sums and gradients in float32 whatever the inputs' dtypes, outputs float32;
    a gradient is rounded once, to its argument's dtype. Deterministic.

    Args:
        input: hidden states; may require grad or not, as may linear_weight.
        linear_weight: the output projection; its dtype may differ from input's, as in autocast.
        target: the label of each token.
        reduction: "mean", "sum" or "none". With "none" nothing is known of the upstream gradient,
            so the backward computes the logits again: 8/6 of the work.
        ignore_index: label of tokens that are left out altogether: they cost nothing, and may hold
            anything, NaN included.
        z_loss: weight of lse^2, which is added to the loss of every token.
        num_items: what "mean" divides by; by default the number of tokens that are not ignored.
            Zero tokens give loss 0 and zero gradients.
        impl: "fused" (chunks of logits, gradients computed with the loss) or "reference" (plain
            PyTorch in the inputs' precision, at least float32, differentiable twice).

    Raises:
        ValueError: shapes, dtypes or devices disagree, an option is unknown, or, on the CPU, a
            label is neither ignore_index nor in 0 .. V - 1.
        NotImplementedError: linear_weight is sharded.

    Source: z_loss: PaLM, arXiv:2204.02311, section 5; everything in one pass over chunks: ours,
    after the chunked losses that the README lists.
    """
    _check_options(reduction, z_loss, num_items, impl)
    _check_tensors(input, linear_weight, target, impl)
    flat, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    valid = labels != ignore_index  # (T,)
    denominator = _denominator(valid, reduction, num_items)
    if impl == "reference":
        from . import _reference as reference

        ops.check_labels(labels, valid, linear_weight.shape[0])
        values = reference.forward(flat, linear_weight, labels, valid)
        return _reduce(*values, denominator, reduction, z_loss)
    if reduction == "none":
        loss, nll, lse = _PerToken.apply(flat, linear_weight, labels, valid, z_loss)
        return LinearCrossEntropyOutput(loss, nll, lse, z_loss * lse.square().sum())
    grads = (_wants_grad(flat), _wants_grad(linear_weight))
    args = (flat, linear_weight, labels, valid, denominator, z_loss, *grads)
    return LinearCrossEntropyOutput(*_Reduced.apply(*args))


def _check_options(
    reduction: str, z_loss: float, num_items: int | Tensor | None, impl: str
) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if impl not in _DTYPES:
        raise ValueError(f"impl must be 'fused' or 'reference', got {impl!r}")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss must be a finite number >= 0, got {z_loss}")
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items is what 'mean' divides by; reduction is {reduction!r}")
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(f"num_items must be one number, got shape {tuple(num_items.shape)}")
    if not isinstance(num_items, Tensor) and num_items < 0:
        raise ValueError(f"num_items must be a count of tokens, got {num_items}")


def _check_tensors(input: Tensor, weight: Tensor, target: Tensor, impl: str) -> None:  # noqa: A002
    if hasattr(weight, "full_tensor"):
        raise NotImplementedError(
            "linear_weight is sharded (a DTensor); pass linear_weight.full_tensor()"
        )
    if input.ndim < 1 or input.shape[:-1] != target.shape:
        raise ValueError(
            f"target must have input's shape without the last axis, got target "
            f"{tuple(target.shape)} and input {tuple(input.shape)}"
        )
    bind_shapes(linear_weight=(weight, "V H"), input=(input.reshape(-1, input.shape[-1]), "T H"))
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}; use target.long()")
    if not input.device == weight.device == target.device:
        raise ValueError(
            f"input, linear_weight and target must be on one device, got {input.device}, "
            f"{weight.device} and {target.device}"
        )
    for name, tensor in (("input", input), ("linear_weight", weight)):
        if tensor.dtype not in _DTYPES[impl]:
            raise ValueError(
                f"{name} is {tensor.dtype}; impl='fused' takes float32, bfloat16 and float16, "
                "impl='reference' also float64"
            )


def _wants_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _denominator(valid: Tensor, reduction: str, num_items: int | Tensor | None) -> Tensor:
    """Return what the sum of the losses is divided by: a float32 scalar, at least 1."""
    if reduction != "mean":
        return torch.ones((), device=valid.device)
    if num_items is None:
        return valid.sum().clamp(min=1).float()
    return torch.as_tensor(num_items, device=valid.device).reshape(()).float().clamp(min=1)


def _reduce(
    nll: Tensor, lse: Tensor, denominator: Tensor, reduction: str, z_loss: float
) -> LinearCrossEntropyOutput:
    """Combine differentiable values per token into the result."""
    z_per_token = z_loss * lse.square()
    z = z_per_token.sum() / denominator
    loss = nll + z_per_token if reduction == "none" else nll.sum() / denominator + z
    return LinearCrossEntropyOutput(
        loss, nll.detach().float(), lse.detach().float(), z.detach().float()
    )


class _Reduced(torch.autograd.Function):
    """Mean or sum: the upstream gradient is one number, so the gradients come with the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # noqa: A002
        linear_weight: Tensor,
        target: Tensor,
        valid: Tensor,
        denominator: Tensor,
        z_loss: float,
        input_grad: bool,
        weight_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        nll, lse, grad_input, grad_weight = ops.forward(
            input, linear_weight, target, valid / denominator, z_loss, input_grad, weight_grad
        )
        # kept in float32: half precision would lose them before a loss scaler's factor arrives
        ctx.save_for_backward(grad_input, grad_weight)
        ctx.wanted = (input_grad and input.dtype, weight_grad and linear_weight.dtype)
        z = z_loss * lse.square().sum() / denominator
        ctx.mark_non_differentiable(nll, lse, z)
        return nll.sum() / denominator + z, nll, lse, z

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        # never in place, nor as they are: a retained graph needs them again
        scaled = [
            (saved * grads[0]).to(dtype) if dtype else None
            for saved, dtype in zip(ctx.saved_tensors, ctx.wanted, strict=True)
        ]
        return (*scaled, None, None, None, None, None, None)


class _PerToken(torch.autograd.Function):
    """One loss per token: the backward computes the logits again, weighted by its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # noqa: A002
        linear_weight: Tensor,
        target: Tensor,
        valid: Tensor,
        z_loss: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        nll, lse, _, _ = ops.forward(
            input, linear_weight, target, valid.float(), z_loss, False, False
        )
        ctx.save_for_backward(input, linear_weight, target, valid)
        ctx.z_loss = z_loss
        ctx.mark_non_differentiable(nll, lse)
        return nll + z_loss * lse.square(), nll, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        input, linear_weight, target, valid = ctx.saved_tensors  # noqa: A001
        token_weight = torch.where(valid, grads[0], 0.0)
        wanted = ctx.needs_input_grad[:2]
        grad_input, grad_weight = ops.backward(
            token_weight, input, linear_weight, target, ctx.z_loss, *wanted
        )
        return (
            grad_input.to(input.dtype) if wanted[0] else None,
            grad_weight.to(linear_weight.dtype) if wanted[1] else None,
            None,
            None,
            None,
        )
