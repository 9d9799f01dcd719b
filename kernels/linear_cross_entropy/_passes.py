"""What is done to a chunk of logits, in place: from products to losses and their gradient.

The three passes take the arguments of the native ones. As torch operations they have two parts,
so that ranks that hold slices of the vocabulary can exchange the first before the second.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._common import native
from ._rules import Rules

Values = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # loss, nll, lse, entropy, correct: (R,)

# of logits that a CPU takes through all operations at a time. 1, 4, 8, 16 and 48 MB: the loss takes
# 1.44, 1.37, 1.31, 1.31 and 1.48 times its products (width 256, vocabulary 49152, one thread, Xeon,
# 2026-11-22): fewer leave the caches less, and more are called less often
_CACHED_BYTES = 8 << 20


class Labels(NamedTuple):
    """What the rows of a chunk are compared with."""

    ids: Tensor  # (R, K) int64, the target first; ids outside 0 .. V - 1 belong to other ranks
    id_weight: Tensor  # (R, K) float32
    class_weight: Tensor | None  # (V,) float32

    def at(self, rows: slice) -> "Labels":
        """Return the labels of some rows."""
        return Labels(self.ids[rows], self.id_weight[rows], self.class_weight)


class Upstream(NamedTuple):
    """Gradients of a row's loss, nll and lse, each (R,) float32."""

    loss: Tensor
    nll: Tensor | None = None
    lse: Tensor | None = None

    def at(self, rows: slice) -> "Upstream":
        """Return the gradients of some rows."""
        nll, lse = (None if grad is None else grad[rows] for grad in self[1:])
        return Upstream(self.loss[rows], nll, lse)


def statistics_(logits: Tensor, bias: Tensor | None, labels: Labels, rules: Rules) -> Values:
    """Return the values of each row; logits are scratch."""
    if _has_native(logits.device):
        return torch.ops.apical.softmax_statistics_(logits, bias, *labels, *rules)
    found = []
    for rows in _blocks(logits):
        scores_(logits[rows], bias, rules)
        whole = merge(partial_(logits[rows], labels.at(rows), rules)[None])
        found.append(whole.values(labels.at(rows), rules))
    return _joined(found)


def gradient_(
    logits: Tensor,
    bias: Tensor | None,
    labels: Labels,
    token_weight: Tensor,
    rules: Rules,
    half: Tensor | None,
) -> Values:
    """Leave d (token_weight x loss) / d products in half or, without it, in logits."""
    if _has_native(logits.device):
        return torch.ops.apical.softmax_gradient_(logits, bias, *labels, token_weight, *rules, half)
    return _gradient_(logits, bias, labels, Upstream(token_weight), rules, half)


def backward_(
    logits: Tensor,
    bias: Tensor | None,
    labels: Labels,
    upstream: Upstream,
    lse: Tensor,
    rules: Rules,
    half: Tensor | None,
) -> None:
    """Leave the gradient for an upstream gradient of each value; lse as the forward returned it."""
    if _has_native(logits.device):
        torch.ops.apical.softmax_backward_(logits, bias, *labels, *upstream, lse, *rules, half)
    else:
        _gradient_(logits, bias, labels, upstream, rules, half)


def _gradient_(
    logits: Tensor,
    bias: Tensor | None,
    labels: Labels,
    upstream: Upstream,
    rules: Rules,
    half: Tensor | None,
) -> Values:
    found = []
    for rows in _blocks(logits):
        some = (logits[rows], bias, labels.at(rows), upstream.at(rows), rules)
        found.append(_gradient_of_block_(*some, None if half is None else half[rows]))
    return _joined(found)


def _blocks(logits: Tensor) -> list[slice]:
    """Return rows to take together through all operations: few on a CPU, elsewhere all."""
    rows, V = logits.shape
    on_cpu = logits.device.type == "cpu"
    size = max(_CACHED_BYTES // (4 * max(V, 1)), 1) if on_cpu else max(rows, 1)
    return [slice(first, first + size) for first in range(0, max(rows, 1), size)]


def _joined(found: list[Values]) -> Values:
    loss, nll, lse, entropy, correct = (torch.cat(part) for part in zip(*found, strict=True))
    return loss, nll, lse, entropy, correct


def _gradient_of_block_(
    logits: Tensor,
    bias: Tensor | None,
    labels: Labels,
    upstream: Upstream,
    rules: Rules,
    half: Tensor | None,
) -> Values:
    slope = scores_(logits, bias, rules)
    parts = partial_(logits, labels, rules)
    whole = merge(parts[None])
    differentiate_(logits, slope, parts, whole, labels, upstream, rules)
    if half is not None:
        half.copy_(logits)
    return whole.values(labels, rules)


def scores_(logits: Tensor, bias: Tensor | None, rules: Rules) -> Tensor | None:
    """Turn products into logits; return d logit / d (logit before the cap), None without a cap."""
    if bias is not None:
        logits.add_(bias)
    logits.mul_(rules.logit_scale)
    if not rules.softcap:
        return None
    logits.div_(rules.softcap).tanh_()
    slope = logits.square().neg_().add_(1)
    logits.mul_(rules.softcap)
    return slope


class Whole(NamedTuple):
    """A row's softmax over the whole vocabulary, (R,) float64; exponentials are those below top."""

    top: Tensor  # the largest logit
    target: Tensor  # the target's logit
    rest: Tensor  # sum of all exponentials but the target's, so that 1 - p keeps its digits
    own: Tensor  # the target's exponential
    log_sum: Tensor  # lse - top
    entropy: Tensor
    labelled: Tensor  # sum over the soft labels of weight x (top - logit)
    uniform: Tensor  # sum over the vocabulary of smoothing's weight x (top - logit)
    uniform_mass: Tensor  # sum over the vocabulary of smoothing's weights

    def values(self, labels: Labels, rules: Rules) -> Values:
        """Return loss, nll, lse, entropy, correct; none is a difference of large numbers."""
        weight = labels.id_weight.double()
        nll, lse = self.log_sum + (self.top - self.target), self.top + self.log_sum
        others = (weight[:, 1:].sum(1) + self.uniform_mass) * self.log_sum
        loss = weight[:, 0] * nll + others + self.labelled + self.uniform
        loss = loss + rules.z_loss * lse.square()
        correct = self.target >= self.top
        return (loss.float(), nll.float(), lse.float(), self.entropy.float(), correct.float())


def partial_(logits: Tensor, labels: Labels, rules: Rules) -> Tensor:
    """Turn logits into exponentials below the row's largest, 0 at the target.

    Returns what `merge` needs of this slice of the vocabulary, (R, 8) float64.
    """
    here, column = _local(labels.ids, logits.shape[1])
    weight = torch.where(here, labels.id_weight, 0.0)[:, 1:]
    picked = logits.gather(1, column)  # (R, K)
    # a slice without one possible token: -inf - -inf would be no number
    top = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
    # no weight, nothing added: also where the logit is -inf
    below = torch.where(weight == 0, 0.0, top - picked[:, 1:])
    uniform = _uniform(logits, top.squeeze(1), labels.class_weight, rules.smoothing)
    mine, target = here[:, :1], picked[:, :1]
    logits.scatter_(1, column[:, :1], target.masked_fill(mine, float("-inf")))
    rest, spread = _exponentials_(logits, top)
    target = target.masked_fill(~mine, float("-inf"))
    soft = ((weight * below).sum(1), weight.sum(1))
    parts = (top.squeeze(1), target.squeeze(1), rest, spread, *soft, *uniform)
    return torch.stack([part.double() for part in parts], 1)


def _exponentials_(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits into exponentials below top; return their sums, and those times top - logit."""
    sums = []
    for rows in _blocks(logits):
        below = logits[rows].sub_(top[rows])
        exps = below.exp()
        # a logit of -inf counts for nothing: 0 times -inf would be no number
        spread = below.clamp_(min=torch.finfo(torch.float32).min).mul_(exps).sum(1).neg_()
        sums.append((exps.sum(1), spread))
        logits[rows] = exps
    rest, spread = (torch.cat(part) for part in zip(*sums, strict=True))
    return rest, spread


def _local(ids: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Return which ids are in this slice of the vocabulary, and a column for each."""
    here = (ids >= 0) & (ids < V)
    return here, torch.where(here, ids, 0)


def _uniform(
    logits: Tensor, top: Tensor, class_weight: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return the sums of smoothing's weights x (top - logit), and of the weights."""
    if not smoothing:
        return torch.zeros_like(top), torch.zeros_like(top)
    each, V = smoothing / logits.shape[1], logits.shape[1]
    if class_weight is None:
        mass, total = top.new_full((), V, dtype=torch.float64), logits.sum(1)
    else:
        mass, total = class_weight.sum(dtype=torch.float64), logits @ class_weight
    return each * (top * mass - total), (each * mass).expand(top.shape)


def merge(parts: Tensor) -> Whole:
    """Combine the slices' parts (N, R, 8), always in the same order."""
    tops, target, rest, spread, labelled, labelled_mass, uniform, uniform_mass = parts.unbind(2)
    top, target = tops.amax(0), target.amax(0)
    lower = top - tops  # (N, R)
    shrink, own = (-lower).exp(), (target - top).exp()
    spread = (shrink * (spread + lower * rest)).sum(0) + torch.special.entr(own)
    rest = (shrink * rest).sum(0)
    log_sum = torch.log1p(rest + (own - 1))
    return Whole(
        top,
        target,
        rest,
        own,
        log_sum,
        log_sum + spread / (rest + own),
        (labelled + lower * labelled_mass).sum(0),
        (uniform + lower * uniform_mass).sum(0),
        uniform_mass.sum(0),
    )


def differentiate_(
    logits: Tensor,
    slope: Tensor | None,
    parts: Tensor,
    whole: Whole,
    labels: Labels,
    upstream: Upstream,
    rules: Rules,
) -> None:
    """Turn the exponentials that `partial_` left into the gradient of the products."""
    per_sum, at_ids = _factors(whole, labels, upstream, rules)
    shrink = (parts[:, 0] - whole.top).exp()
    logits.mul_((per_sum * shrink).float()[:, None])
    here, column = _local(labels.ids, logits.shape[1])
    at_ids = torch.where(here, at_ids, 0.0).float()
    # the target's entry is 0 so far; one label at a time: ids may repeat, sums keep their order
    for k in range(at_ids.shape[1]):
        place = column[:, k : k + 1]
        logits.scatter_(1, place, logits.gather(1, place) + at_ids[:, k : k + 1])
    if rules.smoothing:
        each = upstream.loss * (rules.logit_scale * rules.smoothing / logits.shape[1])
        if labels.class_weight is None:
            logits.sub_(each[:, None])
        else:
            logits.addr_(each, labels.class_weight, alpha=-1)
    if slope is not None:
        logits.mul_(slope)


def _factors(
    whole: Whole, labels: Labels, upstream: Upstream, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Return what exponentials are multiplied by (R,), and what is added at the ids (R, K)."""
    scale, zero = rules.logit_scale, torch.zeros((), dtype=torch.float64)
    grad, grad_nll, grad_lse = (zero if g is None else scale * g.double() for g in upstream)
    pull = grad[:, None] * labels.id_weight  # (R, K)
    lse = whole.top + whole.log_sum
    push = pull.sum(1) + grad * (whole.uniform_mass + 2 * rules.z_loss * lse)
    push, target = push + grad_nll + grad_lse, pull[:, 0] + grad_nll
    total = whole.rest + whole.own
    # push x p - target, with p - 1 written as -rest / total
    at_target = ((push - target) * whole.own - target * whole.rest) / total
    return push / total, torch.cat([at_target[:, None], -pull[:, 1:]], 1)


def _has_native(device: torch.device) -> bool:
    return native.loaded() and torch._C._dispatch_has_kernel_for_dispatch_key(
        "apical::softmax_gradient_", device.type.upper()
    )
