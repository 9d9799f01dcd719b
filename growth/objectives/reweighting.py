"""Documents weighted by their losses: which of a batch matter more is decided in every step."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import check
from ._head import head_loss
from .documents import document_losses, document_of_tokens

_IGNORED = -100
# below this spread all losses of a batch are taken for equal
_SPREAD = 1e-6

Strategy = Literal["linupper", "quadratic", "extremes"]


def document_weights(
    losses: Tensor,
    has_label: Tensor,
    *,
    strategy: Strategy = "linupper",
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the weight of each document; over the documents of all ranks they sum to 1.

        h = 2 (l - (l_max + l_min) / 2) / max(l_max - l_min, 1e-6)           from -1 to 1
        linupper:  f = min(h + 1, 1)     less for easy documents, the hard half alike
        quadratic: f = 1 - h^2           more in the middle
        extremes:  f = |h|               more at both ends
        weight = exp(f / temperature) / sum of it over the documents of all ranks

    Shapes: losses, has_label (N,); result (N,) float64, 0 where a document has no label.
    Deterministic: what the ranks contribute is gathered and added in their order; no host sync.
    Collective: all ranks of a group call it, also one without documents.

    Args:
        losses: mean loss of each document.
        has_label: False for documents that are left out; their loss is never read.
        strategy: the function f of the losses.
        temperature: large is uniform, infinity is allowed.
        group: of torch.distributed, the default group if None; one process where it is not in use.

    Source: arXiv 2502.06733, whose delta is 1 here. The strategies are the released code's.
    """
    losses = losses.detach().double()
    none = losses.new_full((1,), -torch.inf)
    ends = torch.stack(
        [
            torch.cat([none, torch.where(has_label, sign * losses, -torch.inf)]).amax()
            for sign in (1, -1)
        ]
    )
    highest, lowest = _gather(ends, group).amax(0) * ends.new_tensor([1, -1])
    spread = (highest - lowest).clamp(min=_SPREAD)
    place = 2 * (losses - (highest + lowest) / 2) / spread  # (N,)
    scores = torch.where(has_label, _score(place, strategy) / temperature, -torch.inf)
    # equal to the sum of exponentials minus the maximum, without a third exchange
    total = _gather(torch.cat([none, scores]).logsumexp(0, keepdim=True), group).logsumexp(0)
    return torch.where(has_label, (scores - total).exp(), 0)


def _score(place: Tensor, strategy: Strategy) -> Tensor:
    if strategy == "linupper":
        return (place + 1).clamp(max=1)
    return 1 - place.square() if strategy == "quadratic" else place.abs()


def _gather(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the values of all ranks, (ranks, ...)."""
    ranks = _ranks(group)
    if ranks == 1:
        return values[None]
    gathered = [torch.empty_like(values) for _ in range(ranks)]
    dist.all_gather(gathered, values.contiguous(), group=group)
    return torch.stack(gathered)


def _ranks(group: dist.ProcessGroup | None) -> int:
    in_use = dist.is_available() and dist.is_initialized()
    return dist.get_world_size(group) if in_use else 1


@dataclass(frozen=True, kw_only=True)
class Reweighted:
    """Next-token loss with documents weighted by `document_weights`.

        loss = ranks * sum_n weight_n * mean over labelled t in n of (CE_t + z_loss lse_t^2)

    so the mean over ranks, as data parallel training takes it, is the sum over all documents. The
    weights carry no gradient. All documents count alike before their losses do, short ones too:
    with pieces of one length, as in the paper, uniform weights are the plain mean over tokens.

    Needs the losses before the gradients, so the head's products are computed again in backward:
    8/6 of their work.

    Args:
        strategy: see `document_weights`.
        temperature: at the first step after the burn-in.
        final_temperature: at the last step, reached in a straight line; None for no change.
        burn_in: first steps, with uniform weights; 1000 of 20 000 in the released code.
        steps: of the whole phase; needed with final_temperature.
        z_loss: weight of lse^2; ours.

    Raises:
        ValueError: an argument is out of its range.

    Source: arXiv 2502.06733, the weights of its released code; the line of temperatures is ours (it
    advises to start high and to lower it after warm-up).
    """

    strategy: Strategy = "linupper"
    temperature: float = 1.0
    final_temperature: float | None = None
    burn_in: int = 0
    steps: int = 0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        names = get_args(Strategy)
        check(self.strategy in names, self, "strategy", f"one of {', '.join(names)}")
        check(0 < self.temperature < math.inf, self, "temperature", "a positive number")
        final = self.final_temperature
        positive = final is None or 0 < final < math.inf
        check(positive, self, "final_temperature", "a positive number, or None")
        check(self.burn_in >= 0, self, "burn_in", "0 or more")
        enough = final is None or self.steps > self.burn_in
        check(enough, self, "steps", "more than burn_in where there is a final_temperature")
        check(0 <= self.z_loss < math.inf, self, "z_loss", "0 or more")

    def temperature_at(self, step: int) -> float:
        """Return the temperature of a step, counted from 0; infinity in the burn-in."""
        if step < self.burn_in:
            return math.inf
        if self.final_temperature is None:
            return self.temperature
        length = max(self.steps - self.burn_in - 1, 1)
        passed = min((step - self.burn_in) / length, 1.0)
        return (1 - passed) * self.temperature + passed * self.final_temperature

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        cu_seqlens: Tensor,
        step: int = 0,
        linear_bias: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Return the loss, a scalar; 0 where no token has a label.

        Shapes: hidden (T, H); weight (V, H); target (T,) int64; cu_seqlens (N+1,); linear_bias
        (V,). A label is the next token of the same document, so a document's last one is -100.

        Args:
            hidden: last hidden states of documents side by side.
            weight: the head.
            target: the next token, or -100.
            cu_seqlens: where each document begins, and T.
            step: decides the temperature.
            linear_bias: of the head.
            softcap: of the head's logits.
            logit_scale: of the head's logits, before the cap.
            group: see `document_weights`.
        """
        out = head_loss(
            hidden,
            weight,
            target,
            linear_bias=linear_bias,
            reduction="none",
            z_loss=self.z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
        )
        each = document_losses(out.nll, target != _IGNORED, cu_seqlens)
        weights = document_weights(
            each.mean,
            each.tokens > 0,
            strategy=self.strategy,
            temperature=self.temperature_at(step),
            group=group,
        )
        share = _ranks(group) * weights / each.tokens.clamp(min=1)
        # tokens behind the last document belong to none
        owner = document_of_tokens(cu_seqlens, target.numel())
        shares = torch.cat([share, share.new_zeros(1)])[owner].to(out.loss.dtype)
        return (shares * out.loss).sum()
