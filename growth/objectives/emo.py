"""EMO: how far the predicted words are from the right one, beside how likely that one is."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from apical.kernels.emo_loss import emo_loss

from ._bias import with_bias
from ._checks import check

Cost = Literal["frozen", "current"]


@dataclass(frozen=True, kw_only=True)
class EMO:
    """Cross-entropy balanced, token by token, with the earth mover's distance to the label.

        nll = -log p_y,   distance = sum_j p_j (1 - cos(e_y, e_j)),   ratios without gradient
        mode 1:  (nll + min(nll / distance, clamp) * distance) / 2
        mode 2:  (distance / nll) * nll + distance

    Args:
        cost: where the embeddings e come from: "frozen", a copy of the head made before training
            (`costs_of`), or "current", the head as it is, without gradient.
        mode: 1 weighs the likelihood more, 2 the distance.
        clamp: largest ratio of mode 1; None for no limit, as in the adaptive variant.
        exclude_own_mass: compute the ratio with p_y added to the distance.
        z_loss: weight of lse^2; ours.

    Raises:
        ValueError: an argument is out of its range.

    Source: arXiv 2310.04691; the ratios, clamp and variants are the released code's.
    """

    cost: Cost = "frozen"
    mode: int = 1
    clamp: float | None = 3.0
    exclude_own_mass: bool = False
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        check(self.cost in get_args(Cost), self, "cost", "'frozen' or 'current'")
        check(self.mode in (1, 2), self, "mode", "1 or 2")
        fine = self.clamp is None or 0 < self.clamp < float("inf")
        check(fine, self, "clamp", "a positive number, or None")
        check(0 <= self.z_loss < float("inf"), self, "z_loss", "0 or more")

    def costs_of(self, weight: Tensor) -> Tensor | None:
        """Return what to keep from before training: a copy of the head (V, H), or None.

        A copy, because the head itself would follow the training.
        """
        return weight.detach().clone() if self.cost == "frozen" else None

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        costs: Tensor | None,
        linear_bias: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a scalar; 0 where no token has a label.

        Shapes: hidden (T, H); weight (V, H); target (T,) int64; costs (V, D); linear_bias (V,).

        Args:
            hidden: the last hidden states.
            weight: the head.
            target: the next token, or -100.
            costs: of `costs_of`; any embeddings of the same vocabulary will do.
            linear_bias: of the head.
            softcap: of the head's logits.
            logit_scale: of the head's logits, before the cap.
            num_items: what the mean divides by, the tokens with a label by default.

        Raises:
            ValueError: costs are missing for cost="frozen", or given for "current".
        """
        if (costs is None) != (self.cost == "current"):
            found = "missing" if costs is None else "given"
            raise ValueError(
                f"costs are {found}, but cost={self.cost!r}; expected what costs_of(weight) "
                "returned before training"
            )
        extended = with_bias(hidden, weight, linear_bias)
        return emo_loss(
            *extended,
            target,
            weight if costs is None else costs,
            mode=self.mode,
            clamp=self.clamp,
            exclude_own_mass=self.exclude_own_mass,
            z_loss=self.z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            num_items=num_items,
            impl="reference" if hidden.dtype == torch.float64 else "fused",
        ).loss
