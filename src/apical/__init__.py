"""apical: cheaper pre-training by reusing what is already trained.

Every name is loaded when it is first used: the kernels need torch alone, the growing and training
half needs the packages of its extras.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .growth.apply import grow
    from .growth.operators import Stack, Zero
    from .growth.per_layer import PerLayerOptimizer
    from .growth.shards import grow_checkpoint
    from .growth.sparse import (
        Block,
        BlockLinear,
        LowRank,
        LowRankLinear,
        Masked,
        MaskedLinear,
        Monarch,
        MonarchLinear,
        SparseLowRank,
        SparseLowRankLinear,
        sparsify,
    )
    from .growth.sparse.export import export_dense
    from .growth.sparse.files import load
    from .growth.sparse.sltrain import load_sltrain
    from .hf import explain, last_layer_rows, prepack, use_kernels
    from .kernels.emo_loss import emo_loss
    from .kernels.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
    from .kernels.monarch import monarch_matmul
    from .kernels.sparse_low_rank import Support, sparse_low_rank
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
    "Block",
    "BlockLinear",
    "LinearCrossEntropyOutput",
    "LowRank",
    "LowRankLinear",
    "Masked",
    "MaskedLinear",
    "Monarch",
    "MonarchLinear",
    "PackedCollator",
    "PackedLayout",
    "PerLayerOptimizer",
    "SparseLowRank",
    "SparseLowRankLinear",
    "Stack",
    "Support",
    "Zero",
    "emo_loss",
    "explain",
    "export_dense",
    "flash_attn_varlen_func",
    "grow",
    "grow_checkpoint",
    "last_layer_rows",
    "linear_cross_entropy",
    "load",
    "load_sltrain",
    "monarch_matmul",
    "pack",
    "prepack",
    "sparse_low_rank",
    "sparsify",
    "spherical_loss",
    "use_kernels",
    "varlen_attention",
]

_LAZY = {
    "Block": "growth.sparse",
    "BlockLinear": "growth.sparse",
    "LinearCrossEntropyOutput": "kernels.linear_cross_entropy",
    "LowRank": "growth.sparse",
    "LowRankLinear": "growth.sparse",
    "Masked": "growth.sparse",
    "MaskedLinear": "growth.sparse",
    "Monarch": "growth.sparse",
    "MonarchLinear": "growth.sparse",
    "PackedCollator": "packing",
    "PackedLayout": "kernels.varlen_attention",
    "PerLayerOptimizer": "growth.per_layer",
    "SparseLowRank": "growth.sparse",
    "SparseLowRankLinear": "growth.sparse",
    "Stack": "growth.operators",
    "Support": "kernels.sparse_low_rank",
    "Zero": "growth.operators",
    "emo_loss": "kernels.emo_loss",
    "explain": "hf",
    "export_dense": "growth.sparse.export",
    "flash_attn_varlen_func": "kernels.varlen_attention",
    "grow": "growth.apply",
    "grow_checkpoint": "growth.shards",
    "last_layer_rows": "hf",
    "linear_cross_entropy": "kernels.linear_cross_entropy",
    "load": "growth.sparse.files",
    "load_sltrain": "growth.sparse.sltrain",
    "monarch_matmul": "kernels.monarch",
    "pack": "packing",
    "prepack": "hf",
    "sparse_low_rank": "kernels.sparse_low_rank",
    "sparsify": "growth.sparse",
    "spherical_loss": "kernels.spherical_loss",
    "use_kernels": "hf",
    "varlen_attention": "kernels.varlen_attention",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'apical' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
