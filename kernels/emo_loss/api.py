"""The public function: checks its arguments, chooses the implementation, reduces."""

import math
from typing import NamedTuple

from torch import Tensor

from .._common.labelled_rows import check_labels, check_options, check_tensors, denominator_of
from .._common.reduced_loss import reduced, wants
from . import ops
from ._rules import Rules


class EmoLossOutput(NamedTuple):
    """The loss to differentiate, and its parts, detached."""

    loss: Tensor  # scalar
    nll: Tensor  # (T,)
    distance: Tensor  # (T,), with the own mass where that is excluded
    lse: Tensor  # (T,)
    z: Tensor  # scalar


def emo_loss(
    input: Tensor,  # noqa: A002 - torch's own name
    linear_weight: Tensor,
    target: Tensor,
    cost_weight: Tensor | None = None,
    *,
    mode: int = 1,
    clamp: float | None = 3.0,
    exclude_own_mass: bool = False,
    reduction: str = "mean",
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items: int | Tensor | None = None,
    impl: str = "fused",
) -> EmoLossOutput:
    """Return cross-entropy and earth mover's distance, balanced token by token; no logits kept.

    With p the softmax of ``logit_scale * input @ linear_weight.T``, capped if asked for, and c_j
    one minus the cosine between rows y (the label) and j of cost_weight, a token has
    nll = -log p_y and distance = sum_j p_j c_j. Its loss is, ratios without gradient,

        mode 1:  (nll + min(nll / distance, clamp) distance) / 2
        mode 2:  (distance / nll) nll + distance

    Shapes: input (..., H), taken as (T, H); linear_weight (V, H); cost_weight (V, D); target (...)
    int64; loss and z scalars; nll, distance, lse (T,), 0 where ignored.
    Precision: logits, costs, sums and gradients in float32 whatever the inputs' dtypes, outputs
    float32; a gradient is rounded once, to its argument's dtype. Deterministic.

    Args:
        input: hidden states; may require grad or not, as may linear_weight.
        linear_weight: the output projection; its dtype may differ from input's, as in autocast.
        target: the label of each token, not shifted.
        cost_weight: embeddings that say how far tokens are apart, usually the output projection
            before training; never receives a gradient. By default linear_weight as it is now.
            A row of zeros is at distance 1 from every other.
        mode: 1 weighs the likelihood more, 2 the distance; numbered as in the released package.
        clamp: largest ratio of mode 1; None for no limit. Mode 2 has none.
        exclude_own_mass: add p_y to the distance's value, not to its gradient: the value is then
            1 - sum over j != y of p_j cos(y, j), which changes the ratios alone.
        reduction: "mean" or "sum".
        ignore_index: label of tokens that are left out altogether: they cost nothing, and may hold
            anything, NaN included.
        z_loss: weight of lse^2, which is added to the loss of every token.
        softcap: logits become softcap * tanh(logits / softcap).
        num_items: what "mean" divides by; by default the number of tokens that are not ignored.
            Zero tokens give loss 0 and zero gradients.
        impl: "fused" (chunks of logits and costs, gradients computed with the loss) or
            "reference" (plain PyTorch in the inputs' precision, at least float32).

    Raises:
        ValueError: shapes, dtypes or devices disagree, an option is unknown, or, on the CPU, a
            label is neither ignore_index nor in 0 .. V - 1.
        NotImplementedError: a tensor is sharded.

    Source: EMO, arXiv:2310.04691 (DEMD, the upper bound); the combinations: the released code.
    """
    check_options(reduction, ("mean", "sum"), num_items, impl)
    rules = _rules(mode, clamp, exclude_own_mass, z_loss, softcap, logit_scale)
    cost = linear_weight if cost_weight is None else cost_weight
    check_tensors(input, linear_weight, target, impl, cost_weight=(cost, "V D"))
    flat, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    valid = labels != ignore_index  # (T,)
    denominator = denominator_of(valid, reduction, num_items)
    operands = (flat, linear_weight, cost.detach(), labels)
    if impl == "reference":
        from . import _reference as reference

        check_labels(labels[:, None], valid, linear_weight.shape[0])
        loss, *values = reference.forward(*operands, valid, rules)
        loss, values = loss.sum() / denominator, [value.detach().float() for value in values]
    else:
        wanted = wants(flat, linear_weight)
        loss, *values = reduced(ops, operands, valid / denominator, rules, wanted)
    nll, distance, lse = values
    return EmoLossOutput(loss, nll, distance, lse, z_loss * lse.square().sum() / denominator)


def _rules(
    mode: int,
    clamp: float | None,
    exclude_own_mass: bool,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> Rules:
    if mode not in (1, 2):
        raise ValueError(f"mode must be 1 or 2, got {mode!r}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be a finite number >= 0, got {z_loss}")
    for name, value in (("clamp", clamp), ("softcap", softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number > 0, or None, got {value}")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be a finite number, got {logit_scale}")
    limit = math.inf if clamp is None else float(clamp)
    capped, scale = float(softcap or 0.0), float(logit_scale)
    return Rules(mode, limit, bool(exclude_own_mass), float(z_loss), capped, scale)
