"""The numbers of one loss, in the order in which the ops take them."""

from typing import NamedTuple


class Rules(NamedTuple):
    """What is done to the products and to their logsumexp."""

    smoothing: float
    z_loss: float
    softcap: float  # 0: none
    logit_scale: float
