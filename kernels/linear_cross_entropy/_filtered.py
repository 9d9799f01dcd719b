"""The ops of impl="filtered": tiles of next to nothing stay out of the gradients with the loss."""

from typing import Any

from torch import Tensor

from . import ops

backward = ops.backward


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Return what the op returns."""
    return ops.forward(*arguments, filtered=True)
