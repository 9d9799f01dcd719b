"""Tiny models of every family, with no weight left at a value that would hide a mistake."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,  # odd, so that l mod L and l // factor differ
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped queries
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-every-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-no-groups-yarn": {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
        | {"original_max_position_embeddings": 16},
        "max_position_embeddings": 64,
    },
    "mistral-window": {"model_type": "mistral", "sliding_window": 4},
    "qwen2-biases-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window-from-layer-2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
    },
    "qwen3-head-norms-wide-heads": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-every-bias-tied": {
        "model_type": "qwen3",
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "olmo2-post-norms": {"model_type": "olmo2", "attention_bias": True},
}


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """Build the tiny model of a family: `tiny("llama-tied", dtype=torch.float64)`."""

    def build(family: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        config = AutoConfig.for_model(**(_SIZES | FAMILIES[family]))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.4)
        return model.eval()

    return build


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token ids, longer than the windows of the families."""
    return torch.arange(2 * 11).mul(7).remainder(64).view(2, 11)  # (B, S)
