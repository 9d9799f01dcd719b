"""apical: cheaper pre-training by reusing what is already trained.

Every name is loaded when it is first used: the kernels need torch alone, the growing and training
half needs the packages of its extras.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .growth.apply import grow
    from .growth.operators import Stack, Zero
    from .growth.shards import grow_checkpoint
    from .hf import explain, use_kernels
    from .kernels.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
    from .kernels.varlen_attention import varlen_attention

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
    "LinearCrossEntropyOutput": "kernels.linear_cross_entropy",
    "Stack": "growth.operators",
    "Zero": "growth.operators",
    "explain": "hf",
    "grow": "growth.apply",
    "grow_checkpoint": "growth.shards",
    "linear_cross_entropy": "kernels.linear_cross_entropy",
    "use_kernels": "hf",
    "varlen_attention": "kernels.varlen_attention",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'apical' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
