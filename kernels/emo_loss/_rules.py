"""What the loss is made of, once likelihood and distance of a token are known."""

from typing import NamedTuple

from torch import Tensor

# as in the released package: keeps the ratio of two zeros defined
_EPSILON = 1e-10


class Rules(NamedTuple):
    """The options of the loss that the arithmetic of a row depends on."""

    mode: int  # 1 or 2
    clamp: float  # of mode 1's ratio; inf for none
    exclude_own_mass: bool
    z_loss: float
    softcap: float  # 0 for none
    logit_scale: float


def coefficients(
    nll: Tensor, distance: Tensor, rules: Rules
) -> tuple[Tensor | float, Tensor | float]:
    """Return a and b, without gradient, of a token's loss a nll + b distance."""
    nll, distance = nll.detach(), distance.detach()
    if rules.mode == 1:
        return 0.5, 0.5 * (nll / (distance + _EPSILON)).clamp(max=rules.clamp)
    return distance / (nll + _EPSILON), 1.0
