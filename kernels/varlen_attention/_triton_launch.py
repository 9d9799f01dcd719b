"""Configurations of the Triton kernels, and how they see tensors."""

from typing import NamedTuple

import triton
from torch import Tensor


class Configuration(NamedTuple):
    """How a kernel is compiled: tiles, and how they are loaded."""

    tma: bool  # descriptors of the tensor memory accelerator, else pointers
    specialized: bool  # loads and products in warps of their own
    queries: int  # rows of a tile
    keys: int
    warps: int
    stages: int
    spills: int = 0  # registers that may be spilled, as outside of the loop they cost nothing

    @property
    def constants(self) -> dict[str, int | bool]:
        """What the kernel itself is told."""
        return {
            "TMA": self.tma,
            "SPECIALIZED": self.specialized,
            "BLOCK_Q": self.queries,
            "BLOCK_K": self.keys,
        }


def padded(size: int) -> int:
    """Return the columns of the block that holds a head: a power of 2 that matrix units take."""
    return max(16, triton.next_power_of_2(size))


def rows_of(x: Tensor) -> Tensor:
    """Return x, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
