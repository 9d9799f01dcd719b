"""Tables of models with a mixture of experts, as stock checkpoints store them: one by one."""

from __future__ import annotations

from .decoders import PRE_NORMS, QK_NORMS_PER_HEAD, SHARED, attention
from .parts import Weights, linear
from .table import Architecture, Weight


def _experts(name: str, gate: str, up: str, down: str, size: str) -> Weights:
    return {
        **linear(f"{name}.experts.{{expert}}.{gate}", size, "hidden"),
        **linear(f"{name}.experts.{{expert}}.{up}", size, "hidden"),
        **linear(f"{name}.experts.{{expert}}.{down}", "stream", size, residual=True),
        f"{name}.gate.weight": Weight(("experts", "<hidden")),
    }


def _stacked(name: str, gate: str, up: str, down: str) -> dict[str, tuple[str, ...]]:
    # transformers 5 keeps all experts of a layer in two parameters
    one = f"{name}.experts.{{expert}}."
    return {
        "mlp.experts.gate_up_proj": (f"{one}{gate}.weight", f"{one}{up}.weight"),
        "mlp.experts.down_proj": (f"{one}{down}.weight",),
    }


MIXTRAL = Architecture(
    ("mixtral",),
    {
        **attention(PRE_NORMS),
        **_experts("block_sparse_moe", "w1", "w3", "w2", "ffn"),
        **PRE_NORMS,
    },
    SHARED,
    free_heads=True,
    in_memory=((r"\.mlp\.gate\.", ".block_sparse_moe.gate."),),
    stacked=_stacked("block_sparse_moe", "w1", "w3", "w2"),
    keys={"experts": "num_local_experts"},
)
_QWEN_KEYS = {"experts": "num_experts|num_local_experts", "moe_ffn": "moe_intermediate_size"}
QWEN2_MOE = Architecture(
    ("qwen2_moe",),
    {
        **attention(PRE_NORMS, bias="qkv_bias"),
        **_experts("mlp", "gate_proj", "up_proj", "down_proj", "moe_ffn"),
        **linear("mlp.shared_expert.gate_proj", "shared_ffn", "hidden"),
        **linear("mlp.shared_expert.up_proj", "shared_ffn", "hidden"),
        **linear("mlp.shared_expert.down_proj", "stream", "shared_ffn", residual=True),
        "mlp.shared_expert_gate.weight": Weight(("1", "<hidden")),
        **PRE_NORMS,
    },
    SHARED,
    free_heads=True,
    stacked=_stacked("mlp", "gate_proj", "up_proj", "down_proj"),
    keys=_QWEN_KEYS | {"shared_ffn": "shared_expert_intermediate_size"},
)
_QWEN3_NORMS = {**PRE_NORMS, **QK_NORMS_PER_HEAD}
QWEN3_MOE = Architecture(
    ("qwen3_moe",),
    {
        **attention(_QWEN3_NORMS, bias="attention_bias", o_bias="attention_bias"),
        **_experts("mlp", "gate_proj", "up_proj", "down_proj", "moe_ffn"),
        **_QWEN3_NORMS,
    },
    SHARED,
    free_heads=True,
    stacked=_stacked("mlp", "gate_proj", "up_proj", "down_proj"),
    keys=_QWEN_KEYS,
)

TABLES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE)
