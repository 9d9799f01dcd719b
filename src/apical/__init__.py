"""apical: cheaper pre-training by reusing what is already trained.

Every name is loaded when it is first used: the kernels need torch alone, the growing and training
half needs the packages of its extras.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .growth.apply import grow
    from .growth.interpolate import Interpolate
    from .growth.learned import fit_growth
    from .growth.merge import (
        EMA,
        Average,
        GreedySoup,
        Linear,
        Posterior,
        TaskVectors,
        merge,
        merge_checkpoints,
    )
    from .growth.operators import (
        AdvancedKnowledge,
        Coalesce,
        Decoalesce,
        Interleave,
        Learned,
        LinearExpand,
        Overlap,
        RandomDepth,
        Stack,
        StackTop,
        Widen,
        ZeroDepth,
        progressive,
        progressive_top,
    )
    from .growth.per_layer import PerLayerOptimizer
    from .growth.plan import GrowthPlan
    from .growth.preview import plan
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
    "EMA",
    "AdvancedKnowledge",
    "Average",
    "Block",
    "BlockLinear",
    "Coalesce",
    "Decoalesce",
    "GreedySoup",
    "GrowthPlan",
    "Interleave",
    "Interpolate",
    "Learned",
    "Linear",
    "LinearCrossEntropyOutput",
    "LinearExpand",
    "LowRank",
    "LowRankLinear",
    "Masked",
    "MaskedLinear",
    "Monarch",
    "MonarchLinear",
    "Overlap",
    "PackedCollator",
    "PackedLayout",
    "PerLayerOptimizer",
    "Posterior",
    "RandomDepth",
    "SparseLowRank",
    "SparseLowRankLinear",
    "Stack",
    "StackTop",
    "Support",
    "TaskVectors",
    "Widen",
    "ZeroDepth",
    "emo_loss",
    "explain",
    "export_dense",
    "fit_growth",
    "flash_attn_varlen_func",
    "grow",
    "grow_checkpoint",
    "last_layer_rows",
    "linear_cross_entropy",
    "load",
    "load_sltrain",
    "merge",
    "merge_checkpoints",
    "monarch_matmul",
    "pack",
    "plan",
    "prepack",
    "progressive",
    "progressive_top",
    "sparse_low_rank",
    "sparsify",
    "spherical_loss",
    "use_kernels",
    "varlen_attention",
]

_LAZY = {
    "EMA": "growth.merge",
    "AdvancedKnowledge": "growth.operators",
    "Average": "growth.merge",
    "Block": "growth.sparse",
    "BlockLinear": "growth.sparse",
    "Coalesce": "growth.operators",
    "Decoalesce": "growth.operators",
    "GreedySoup": "growth.merge",
    "GrowthPlan": "growth.plan",
    "Interleave": "growth.operators",
    "Interpolate": "growth.interpolate",
    "Learned": "growth.operators",
    "Linear": "growth.merge",
    "LinearCrossEntropyOutput": "kernels.linear_cross_entropy",
    "LinearExpand": "growth.operators",
    "LowRank": "growth.sparse",
    "LowRankLinear": "growth.sparse",
    "Masked": "growth.sparse",
    "MaskedLinear": "growth.sparse",
    "Monarch": "growth.sparse",
    "MonarchLinear": "growth.sparse",
    "Overlap": "growth.operators",
    "PackedCollator": "packing",
    "PackedLayout": "kernels.varlen_attention",
    "PerLayerOptimizer": "growth.per_layer",
    "Posterior": "growth.merge",
    "RandomDepth": "growth.operators",
    "SparseLowRank": "growth.sparse",
    "SparseLowRankLinear": "growth.sparse",
    "Stack": "growth.operators",
    "StackTop": "growth.operators",
    "Support": "kernels.sparse_low_rank",
    "TaskVectors": "growth.merge",
    "Widen": "growth.operators",
    "ZeroDepth": "growth.operators",
    "emo_loss": "kernels.emo_loss",
    "explain": "hf",
    "export_dense": "growth.sparse.export",
    "flash_attn_varlen_func": "kernels.varlen_attention",
    "fit_growth": "growth.learned",
    "grow": "growth.apply",
    "grow_checkpoint": "growth.shards",
    "last_layer_rows": "hf",
    "linear_cross_entropy": "kernels.linear_cross_entropy",
    "load": "growth.sparse.files",
    "load_sltrain": "growth.sparse.sltrain",
    "merge": "growth.merge",
    "merge_checkpoints": "growth.merge",
    "monarch_matmul": "kernels.monarch",
    "pack": "packing",
    "plan": "growth.preview",
    "prepack": "hf",
    "progressive": "growth.operators",
    "progressive_top": "growth.operators",
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
