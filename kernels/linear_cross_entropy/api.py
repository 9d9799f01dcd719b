"""The public function: checks its arguments, chooses the implementation, reduces."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._common.labelled_rows import check_items, check_labels
from . import _checks as check
from . import _filtered as filtered
from . import ops
from ._autograd import Operands, per_token, reduced
from ._labels import Lookup, at_ids, targets
from ._rules import Rules

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LinearCrossEntropyOutput(NamedTuple):
    """The loss to differentiate, and what else is known of the tokens, in float32."""

    loss: Tensor  # scalar, or target's shape for reduction="none"
    nll: Tensor  # (T,)
    lse: Tensor  # (T,)
    z: Tensor  # scalar
    accuracy: Tensor  # scalar
    entropy: Tensor  # (T,)


def linear_cross_entropy(
    input: Tensor,  # noqa: A002 - torch's own name
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    soft_ids: Tensor | None = None,
    soft_weights: Tensor | None = None,
    process_group: "ProcessGroup | None" = None,
    impl: str = "fused",
) -> LinearCrossEntropyOutput:
    """Return the cross-entropy of ``input @ linear_weight.T`` without keeping the logits.

    With ``s = logit_scale * (input @ linear_weight.T + linear_bias)``, capped by softcap to ``z``,
    and ``lse = logsumexp(z)``, a token's loss is ``lse - z[target]``, plus ``z_loss * lse ** 2``.

    Shapes: input (..., H), taken as (T, H); linear_weight (V, H); linear_bias, weight (V,);
    target, token_weight (...); soft_ids, soft_weights (..., S). Result: loss a scalar, or (...) for
    reduction "none"; nll, lse, entropy (T,), 0 where ignored; z and accuracy scalars. nll is the
    plain one, without weights and smoothing; z is what z_loss has added to the loss; accuracy is
    the share of tokens whose target has the largest logit. With "none" loss, nll and lse are
    differentiable, else loss alone.
    Precision: logits and sums in float32 or better whatever the inputs' dtypes, outputs float32; a
    gradient is rounded once, to its argument's dtype. Deterministic.

    Args:
        input: hidden states; may require grad or not, as may linear_weight and linear_bias.
        linear_weight: the output projection; its dtype may differ from input's, as in autocast.
        target: int64, the label of each token.
        linear_bias: added to the products.
        weight: weight of each class, as torch's: of labels and, in smoothing, of every entry.
        reduction: "mean", "sum" or "none". With "none" nothing is known of the upstream gradient,
            so the backward computes the logits again: 8/6 of the work.
        ignore_index: label of tokens that are left out altogether: they cost nothing, and may hold
            anything, NaN included.
        label_smoothing: share of the label that is spread evenly over the vocabulary, 0 to 1.
        z_loss: weight of lse^2, which is added to the loss of every token.
        softcap: c of ``c * tanh(s / c)``; None: no cap.
        logit_scale: factor on products and bias.
        token_weight: factor on each token's loss; 0 leaves a token out as ignore_index does.
        num_items: what "mean" divides by; by default the number of tokens that are not ignored,
            or, with class weights, the sum of their targets' weights; token_weight has no part in
            it. Zero gives loss 0 and zero gradients.
        soft_ids: int64, further labels of each token, such as a teacher's most likely tokens.
        soft_weights: their shares of the label; the target has what they leave of 1. Ids that
            occur twice add up; a share of 0 makes an id a filler.
        process_group: the ranks whose linear_weight, linear_bias and weight are slices of the
            vocabulary, in rank order. The other arguments, ids of the whole vocabulary among them,
            are the same on all ranks, and so are the result and input's gradient.
        impl: "fused" (chunks of logits, gradients computed with the loss); "filtered" (the same
            outputs, but the gradients of input and linear_weight leave out each tile of 128 tokens
            and 128 classes that holds no label and no softmax of eps / 32 or more, eps that of the
            dtype: 2.4e-4 in bfloat16. Only on GPUs in half precision: on the CPU, in float32, for
            reduction "none", and with both softcap and label_smoothing, nothing is left out); or
            "reference" (plain PyTorch in the inputs' precision, at least float32, differentiable
            twice).

    Raises:
        ValueError: shapes, dtypes or devices disagree, an option is unknown, or, on the CPU, a
            label is neither ignore_index nor in 0 .. V - 1.
        NotImplementedError: a tensor is sharded by torch (a DTensor).

    Source: z_loss: PaLM, arXiv:2204.02311, section 5; soft labels: SALT, arXiv:2410.18779;
    "filtered": gradient filtering of Cut Cross-Entropy, arXiv:2411.09009;
    everything in one pass over chunks: ours, after the chunked losses that the README lists.
    """
    check.choices(reduction, impl, grouped=process_group is not None)
    check.numbers(label_smoothing, z_loss, softcap, logit_scale)
    check_items(num_items, reduction)
    check.operands(input, linear_weight, linear_bias, weight, target, impl)
    check.shares(target, token_weight, soft_ids, soft_weights)
    backend, lookup = _backend(process_group, linear_weight, impl)
    dtype = _label_dtype(input, linear_weight, impl)
    labels = targets(
        target.reshape(-1),
        weight,
        token_weight,
        None if soft_ids is None or soft_weights is None else (soft_ids, soft_weights),
        ignore_index=ignore_index,
        smoothing=label_smoothing,
        divide=reduction == "mean",
        num_items=num_items,
        dtype=dtype,
        lookup=lookup,
    )
    rows, classes = input.reshape(-1, input.shape[-1]), None if weight is None else weight.to(dtype)
    operands = Operands(rows, linear_weight, linear_bias, labels.ids, labels.id_weight, classes)
    rules = Rules(label_smoothing, z_loss, softcap or 0.0, logit_scale)
    scale = labels.token_weight / labels.denominator
    bind = _reference if impl == "reference" else per_token if reduction == "none" else reduced
    loss, *values = bind(operands, scale, rules, backend)
    if reduction != "none":
        loss, *values = loss.sum(), *(value.detach() for value in values)
    return _output(loss, *values, scale, z_loss, target.shape)


def _backend(group: "ProcessGroup | None", linear_weight: Tensor, impl: str) -> tuple[Any, Lookup]:
    """Return what has the ops' forward and backward, and what reads class weights."""
    if group is None:
        return (filtered if impl == "filtered" else ops), at_ids
    from ._parallel import Slices

    slices = Slices(group, linear_weight)
    return slices, slices.at_ids


def _label_dtype(input: Tensor, linear_weight: Tensor, impl: str) -> torch.dtype:  # noqa: A002
    if impl != "reference":
        return torch.float32
    return torch.promote_types(input.dtype, torch.promote_types(linear_weight.dtype, torch.float32))


def _reference(operands: Operands, scale: Tensor, rules: Rules, backend: Any) -> tuple[Tensor, ...]:
    from . import _reference as reference

    check_labels(operands.ids, scale != 0, operands.linear_weight.shape[0])
    return reference.forward(operands, scale, rules)


def _output(
    loss: Tensor,
    nll: Tensor,
    lse: Tensor,
    entropy: Tensor,
    correct: Tensor,
    scale: Tensor,
    z_loss: float,
    shape: torch.Size,
) -> LinearCrossEntropyOutput:
    z = z_loss * (scale * lse.detach().square()).sum()
    accuracy = correct.sum() / (scale != 0).sum().clamp(min=1)
    loss = loss.reshape(shape) if loss.ndim else loss
    return LinearCrossEntropyOutput(loss, nll, lse, z, accuracy, entropy)
