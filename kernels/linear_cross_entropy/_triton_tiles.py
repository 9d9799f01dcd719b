"""What the Triton kernels of the loss share: configurations, counts and logits."""

from typing import NamedTuple

import triton
import triton.language as tl

from .._common.triton_tiles import Tiles

LOG2E = tl.constexpr(1.4426950408889634)
# rows of every buffer are a multiple of this: no tile ends inside of one
ROWS = 128


class Configuration(Tiles):
    """How a matrix product is compiled."""

    @property
    def piece(self) -> int:
        """Columns that are summed at a time: half of a wide tile."""
        return min(self.columns, 128)


class Fixed(NamedTuple):
    """How a kernel without products is compiled."""

    warps: int
    spills: int = 0
    stages: int = 2

    @property
    def constants(self) -> dict[str, int]:
        """Nothing: its blocks follow from the shapes."""
        return {}


@triton.jit
def rows_here(count_ptr, first, C):
    """Return how many of the C rows from `first` on there are, of as many as the device knows."""
    return tl.minimum(tl.maximum(tl.load(count_ptr) - first, 0), C).to(tl.int32)


@triton.jit
def capped(s, cap):
    """Return cap tanh(s / cap), and its derivative without a difference that cancels."""
    small = tl.exp2(tl.abs(s) * (-2.0 * LOG2E / cap))
    z = cap * (1.0 - small) / (1.0 + small)
    return tl.where(s < 0.0, -z, z), 4.0 * small / ((1.0 + small) * (1.0 + small))


@triton.jit
def halves(acc):
    """Return the left and the right half of a tile: to leave it whole takes too much memory."""
    pair = tl.reshape(acc, [acc.shape[0], 2, acc.shape[1] // 2])
    return tl.split(tl.permute(pair, [0, 2, 1]))
