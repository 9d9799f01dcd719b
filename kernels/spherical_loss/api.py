"""The public functions: check their arguments, choose the implementation, bind the gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._common.labelled_rows import check_labels, check_options, check_tensors, denominator_of
from . import ops
from ._statistics import SphericalStatistics


def spherical_loss(
    input: Tensor,  # noqa: A002 - torch's own name
    linear_weight: Tensor,
    target: Tensor,
    loss: Callable[[SphericalStatistics], Tensor],
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    num_items: int | Tensor | None = None,
    impl: str = "fused",
) -> Tensor:
    """Return a loss of the logits ``input @ linear_weight.T`` that are never computed.

    Shapes: input (..., H), taken as (T, H); linear_weight (V, H); target (...) int64; result a
    scalar, or (...) for reduction "none"; float32, of the reference float64.
    Precision, determinism: as `spherical_statistics`.

    Args:
        input: hidden states; may require grad or not, as may linear_weight.
        linear_weight: the output projection; its dtype may differ from input's, as in autocast.
        target: the label of each token, not shifted.
        loss: a differentiable function of the statistics that returns a loss per token, (T,);
            `standardized_loss`, `log_taylor_softmax`, `log_spherical_softmax`, or your own.
        reduction: "mean", "sum" or "none".
        ignore_index: label of tokens that are left out altogether: they cost nothing, and may hold
            anything, NaN included.
        logit_scale: what the logits are multiplied by.
        num_items: what "mean" divides by; by default the number of tokens that are not ignored.
            Zero tokens give loss 0 and zero gradients.
        impl: "fused" or "reference" (all logits, in float64, differentiable twice).

    Raises:
        ValueError: shapes, dtypes or devices disagree, an option is unknown, or, on the CPU, a
            label is neither ignore_index nor in 0 .. V - 1.
        NotImplementedError: a tensor is sharded.

    Source: the family, Vincent et al. 2015, arXiv:1412.7091; the batch form: ours.
    """
    check_options(reduction, ("mean", "sum", "none"), num_items, impl)
    options: dict[str, Any] = {"ignore_index": ignore_index, "impl": impl}
    statistics = spherical_statistics(input, linear_weight, target, **options)
    valid = (target != ignore_index).reshape(-1)
    # where nothing was measured, a loss may be infinite
    values = torch.where(valid, loss(statistics.scaled(logit_scale)), 0.0)
    values = values if impl == "reference" else values.float()
    if reduction == "none":
        return values.view(target.shape)
    return values.sum() / denominator_of(valid, reduction, num_items)


def spherical_statistics(
    input: Tensor,  # noqa: A002 - torch's own name
    linear_weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    impl: str = "fused",
) -> SphericalStatistics:
    """Return mean and variance of each token's logits, and its label's distance from the mean.

    The cost is 4 V H^2 + 4 T H^2 with both gradients, against 6 T V H with logits: less where
    there are more tokens than the model is wide.

    Shapes: input (..., H), taken as (T, H); linear_weight (V, H); target (...) int64; result (T,).
    Precision: statistics in float64 whatever the inputs' dtypes; of linear_weight's gradient the
    product over V in float32; a gradient is rounded once, to its argument's dtype. A variance
    below 1e-13 of |h|^2 times the rows' mean squared distance from their mean is 0.
    Deterministic. Differentiable once.

    Args:
        input: hidden states; may require grad or not, as may linear_weight.
        linear_weight: the output projection.
        target: the label of each token.
        ignore_index: label of tokens that are left out.
        impl: "fused" or "reference" (all logits, in float64, differentiable twice).

    Raises:
        ValueError: as `spherical_loss`.
        NotImplementedError: a tensor is sharded.

    Source: ours, after Vincent et al. 2015, arXiv:1412.7091.
    """
    check_options("none", ("none",), None, impl)
    check_tensors(input, linear_weight, target, impl)
    flat, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    valid = labels != ignore_index  # (T,)
    if impl == "reference":
        from . import _reference as reference

        check_labels(labels[:, None], valid, linear_weight.shape[0])
        return reference.forward(flat, linear_weight, labels, valid)
    input_grad = flat.requires_grad and torch.is_grad_enabled()
    values = _Statistics.apply(flat, linear_weight, labels, valid, input_grad)
    return SphericalStatistics(*values.unbind(), vocabulary=linear_weight.shape[0])


class _Statistics(torch.autograd.Function):
    """The statistics as (3, T); whatever loss is made of them, its gradients come back here."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # noqa: A002
        linear_weight: Tensor,
        target: Tensor,
        valid: Tensor,
        input_grad: bool,
    ) -> Tensor:
        statistics, centre, pull = ops.forward(input, linear_weight, target, valid, input_grad)
        ctx.save_for_backward(input, linear_weight, target, valid, centre, pull)
        return statistics

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        input, linear_weight = ctx.saved_tensors[:2]  # noqa: A001
        wanted = ctx.needs_input_grad[:2]
        grad_input, grad_weight = ops.backward(grads, *ctx.saved_tensors, *wanted)
        return (
            grad_input.to(input.dtype) if wanted[0] else None,
            grad_weight.to(linear_weight.dtype) if wanted[1] else None,
            None,
            None,
            None,
        )
