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
    from .hf import explain, last_layer_rows, prepack, use_kernels
    from .kernels.emo_loss import emo_loss
    from .kernels.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
    from .kernels.spherical_loss import spherical_loss
    from .kernels.varlen_attention import (
        PackedLayout,
        flash_attn_varlen_func,
        varlen_attention,
    )
    from .packing import PackedCollator, pack

# read by the build as well; no metadata is needed to import from a checkout
__version__ = "0.1.0"

__all__ = [
    "LinearCrossEntropyOutput",
    "PackedCollator",
    "PackedLayout",
    "Stack",
    "Zero",
    "emo_loss",
    "explain",
    "flash_attn_varlen_func",
    "grow",
    "grow_checkpoint",
    "last_layer_rows",
    "linear_cross_entropy",
    "pack",
    "prepack",
    "spherical_loss",
    "use_kernels",
    "varlen_attention",
]

_LAZY = {
    "LinearCrossEntropyOutput": "kernels.linear_cross_entropy",
    "PackedCollator": "packing",
    "PackedLayout": "kernels.varlen_attention",
    "Stack": "growth.operators",
    "Zero": "growth.operators",
    "emo_loss": "kernels.emo_loss",
    "explain": "hf",
    "flash_attn_varlen_func": "kernels.varlen_attention",
    "grow": "growth.apply",
    "grow_checkpoint": "growth.shards",
    "last_layer_rows": "hf",
    "linear_cross_entropy": "kernels.linear_cross_entropy",
    "pack": "packing",
    "prepack": "hf",
    "spherical_loss": "kernels.spherical_loss",
    "use_kernels": "hf",
    "varlen_attention": "kernels.varlen_attention",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'apical' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
