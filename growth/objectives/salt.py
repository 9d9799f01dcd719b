"""SALT: a small language model teaches a large one early on, and chooses what it reads."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check
from ._head import logit_chunks
from .distillation import Distillation
from .documents import document_of_tokens

_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Salt(Distillation):
    """Distillation for the first `steps` steps, then plain next-token prediction: a hard switch.

        loss(step) = (1 - omega) * CE(target) + omega * CE(teacher^rho)   for step < steps
                     CE(target)                                           from then on

    What depends on the step depends on nothing else, so a resumed run goes on exactly.

    Args:
        steps: optimizer steps that distil; the paper's 36 000 of about 208 000, robust from 20 000
            to 60 000.
        omega: share of the teacher; the default is the paper's from memory, not verified.
        rho: power of the teacher's probabilities; the default likewise from memory.
        top_k: tokens of the teacher. The paper distils from all of the vocabulary and has the
            top-k only in appendix A.2; the data selection takes 10.
        z_loss: weight of lse^2; ours.

    Source: arXiv 2410.18779, section 4.
    """

    steps: int
    omega: float = 2 / 3
    rho: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.steps >= 0, self, "steps", "0 or more")

    def distils(self, step: int) -> bool:
        """Return whether a step, counted from 0, needs the teacher."""
        return step < self.steps


class TokenScores(NamedTuple):
    """A small model's loss of each token, and whether the token is among its most likely ones."""

    losses: Tensor  # (T,) at least float32, 0 where ignored
    in_top_k: Tensor  # (T,) bool, False where ignored


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    top_k: int = 10,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TokenScores:
    """Return what `median_scores` needs of every token; logits exist for some rows at a time.

    A token is in the top k where fewer than `top_k` logits are above its own.

    Shapes: hidden (T, H); weight (V, H); target (T,) int64, -100 where there is no label.
    """
    head = {"linear_bias": linear_bias, "softcap": softcap, "logit_scale": logit_scale}
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.zeros(target.shape, dtype=dtype, device=hidden.device)
    inside = torch.zeros(target.shape, dtype=torch.bool, device=hidden.device)
    for rows, logits in logit_chunks(hidden, weight, **head):
        valid = target[rows] != _IGNORED
        own = logits.gather(1, target[rows].clamp(min=0)[:, None])
        nll = logits.logsumexp(-1) - own.squeeze(1)
        losses[rows] = torch.where(valid, nll, 0)
        inside[rows] = ((logits > own).sum(-1) < top_k) & valid
    return TokenScores(losses, inside)


def median_scores(losses: Tensor, in_top_k: Tensor, valid: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the score by which SALT chooses each document of a packed batch.

        score_n = median over the labelled t of document n of  losses_t * [in_top_k_t]

    A token outside the top k counts as 0, so that a document of noise scores low, not high. Of an
    even number of tokens the median is the mean of the middle two; without any it is -inf.

    Shapes: losses, in_top_k, valid (T,); cu_seqlens (N+1,); result (N,) of losses' dtype.
    Deterministic; no host sync.

    Source: arXiv 2410.18779, Eq. 10; that the product masks (and not a choice of the tokens over
    which the median is taken) is from memory, not verified.
    """
    documents = cu_seqlens.numel() - 1
    owner = torch.where(valid, document_of_tokens(cu_seqlens, losses.numel()), documents)
    values, order = torch.where(in_top_k, losses, 0).sort(stable=True)
    owner, regrouped = owner[order].sort(stable=True)
    # a guard for documents without tokens behind the last value
    values = torch.cat([values[regrouped], values.new_zeros(1)])
    numbers = torch.arange(documents, device=owner.device)
    start = torch.searchsorted(owner, numbers)
    count = torch.searchsorted(owner, numbers, right=True) - start
    low, high = start + (count - 1).clamp(min=0) // 2, start + count // 2
    return torch.where(count > 0, (values[low] + values[high]) / 2, -torch.inf)


def select_by_median_loss(scores: Tensor, *, keep: int) -> Tensor:
    """Return the numbers of the `keep` documents with the largest scores, in ascending order.

    Of equal scores the earlier document is taken.

    Shapes: scores (N,), of `median_scores`; result (keep,) int64, or (N,) if there are fewer.

    Raises:
        ValueError: keep is negative.

    Source: arXiv 2410.18779, Eq. 10.
    """
    if keep < 0:
        raise ValueError(f"keep is {keep}; expected a number of documents, 0 or more")
    return scores.argsort(descending=True, stable=True)[:keep].sort().values
