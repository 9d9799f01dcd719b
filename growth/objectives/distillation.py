"""Learning from a teacher's most likely next tokens, as soft labels of the fused loss."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ._checks import check
from ._head import head_loss, logit_chunks

Tail = Literal["drop", "label"]


class SoftLabels(NamedTuple):
    """A teacher's `top_k` most likely tokens after each token, and their probabilities."""

    ids: Tensor  # (T, S) int64
    weights: Tensor  # (T, S) float32, or float64; every row sums to 1 at most


@torch.no_grad()
def soft_labels(
    hidden: Tensor,
    weight: Tensor,
    *,
    top_k: int,
    rho: float = 1.0,
    tail: Tail = "drop",
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> SoftLabels:
    """Return a teacher's soft labels; its logits exist for a chunk of rows at a time.

        weights_s = q_s^rho / sum of q^rho,     q = softmax(teacher's logits)

    The sum is over the top_k for tail="drop", over all tokens for tail="label".

    Shapes: hidden (T, H), the teacher's; weight (V, H); linear_bias (V,).
    Precision: at least float32. Deterministic where torch.topk is.

    Args:
        hidden: the teacher's last hidden states.
        weight: the teacher's head.
        top_k: tokens to keep, at most V.
        rho: power of the probabilities, one over the temperature: below 1 is flatter.
        tail: what becomes of the other tokens' share: see `Distillation`.
        linear_bias: of the head.
        softcap: of the head's logits.
        logit_scale: of the head's logits, before the cap.

    Raises:
        ValueError: top_k is above V.
    """
    if top_k > weight.shape[0]:
        raise ValueError(f"top_k is {top_k}, but the teacher has {weight.shape[0]} tokens")
    head = {"linear_bias": linear_bias, "softcap": softcap, "logit_scale": logit_scale}
    parts = [_best(rho * z, top_k, tail) for _, z in logit_chunks(hidden, weight, **head)]
    if not parts:
        empty = hidden.new_empty(0, top_k)
        return SoftLabels(empty.long(), empty.to(torch.promote_types(hidden.dtype, torch.float32)))
    return SoftLabels(*map(torch.cat, zip(*parts, strict=True)))


def _best(scaled: Tensor, top_k: int, tail: Tail) -> tuple[Tensor, Tensor]:
    values, ids = scaled.topk(top_k)
    among = values if tail == "drop" else scaled
    return ids, (values - among.logsumexp(-1, keepdim=True)).exp()


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Cross-entropy against a mix of the next token and a teacher's soft labels.

        loss = mean over labelled t of  (1 - omega * sum_s w_ts) * CE(target_t)
               + omega * sum_s w_ts * CE(id_ts) + z_loss * lse_t^2

    where the weights w of `soft_labels` sum to 1 for tail="drop". CE against a teacher is its KL
    divergence plus a constant, so the gradient is that of KL.

    Args:
        omega: share of the teacher, 0 to 1.
        rho: power of the teacher's probabilities; 1 / temperature.
        top_k: most likely tokens of the teacher that are kept.
        tail: "drop" leaves the other tokens out and scales the kept ones up, "label" gives the
            others' share to the label. With few tokens of an unsure teacher, "drop" makes it sure.
        z_loss: weight of lse^2.

    Raises:
        ValueError: an argument is out of its range.

    Source: Hinton et al. 2015 (arXiv 1503.02531), without the factor of the temperature squared.
    """

    omega: float
    rho: float = 1.0
    top_k: int = 10
    tail: Tail = "drop"
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        check(0 <= self.omega <= 1, self, "omega", "from 0 to 1")
        check(0 < self.rho < float("inf"), self, "rho", "a positive number")
        check(self.top_k >= 1, self, "top_k", "at least 1")
        check(self.tail in get_args(Tail), self, "tail", "'drop' or 'label'")
        check(0 <= self.z_loss < float("inf"), self, "z_loss", "0 or more")

    def labels(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        linear_bias: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> SoftLabels:
        """Return what a teacher with these hidden states and this head teaches: `soft_labels`."""
        head = {"linear_bias": linear_bias, "softcap": softcap, "logit_scale": logit_scale}
        kept: dict[str, Any] = {"top_k": self.top_k, "rho": self.rho, "tail": self.tail}
        return soft_labels(hidden, weight, **kept, **head)

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        labels: SoftLabels | None,
        linear_bias: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> Tensor:
        """Return the loss, a scalar; 0 where no token has a label.

        Shapes: hidden (T, H); weight (V, H); target (T,) int64; linear_bias (V,).

        Args:
            hidden: the student's last hidden states.
            weight: the student's head.
            target: the next token, or -100.
            labels: of the teacher for these tokens; None for plain next-token prediction.
            linear_bias: of the head.
            softcap: of the head's logits.
            logit_scale: of the head's logits, before the cap.
        """
        soft = (None, None) if labels is None else (labels.ids, self.omega * labels.weights)
        return head_loss(
            hidden,
            weight,
            target,
            linear_bias=linear_bias,
            z_loss=self.z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            soft_ids=soft[0],
            soft_weights=soft[1],
        ).loss
