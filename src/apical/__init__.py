"""apical: cheaper pre-training by reusing what is already trained.

Importing this package needs torch alone; the names of the growing and training half are
loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

from .kernels.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from .kernels.varlen_attention import varlen_attention

if TYPE_CHECKING:
    from .growth.apply import grow
    from .growth.operators import Stack, Zero
    from .growth.shards import grow_checkpoint
    from .hf import explain, use_kernels

# read by the build as well; no metadata is needed to import from a checkout
__version__ = "0.1.0"

__all__ = [
    "LinearCrossEntropyOutput",
    "Stack",
    "Zero",
    "explain",
    "grow",
    "grow_checkpoint",
    "linear_cross_entropy",
    "use_kernels",
    "varlen_attention",
]

_LAZY = {
    "Stack": "growth.operators",
    "Zero": "growth.operators",
    "explain": "hf",
    "grow": "growth.apply",
    "grow_checkpoint": "growth.shards",
    "use_kernels": "hf",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'apical' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
