"""Tiny models of every family, with no weight left at a value that would hide a mistake."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

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
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
# two layers are enough where only the maps of width differ
_TWO = {"num_hidden_layers": 2}
_EXPERTS = {"num_experts_per_tok": 2} | _TWO
_QWEN = {"num_experts": 3, "moe_intermediate_size": 24} | _EXPERTS
_SPECIAL = {"cls_token_id": 3, "sep_token_id": 4}

DECODERS: dict[str, dict[str, Any]] = {
    "llama-tied": {"model_type": "llama"} | _TIED,
    "llama-every-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-no-groups-yarn": {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
        | {"original_max_position_embeddings": 16},
        "max_position_embeddings": 64,
    },
    "mistral-window": {"model_type": "mistral", "sliding_window": 4},
    "qwen2-biases-tied": {"model_type": "qwen2"} | _TIED,
    "qwen2-window-from-layer-2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
    },
    "qwen3-head-norms-wide-heads": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-every-bias-tied": {"model_type": "qwen3", "attention_bias": True} | _TIED,
    "olmo2-post-norms": {"model_type": "olmo2", "attention_bias": True},
}
# further names of layers, layouts of weights, norms, heads, and experts
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2-tied": {"model_type": "gemma2", "head_dim": 8} | _TIED | _TWO,
    "gemma3-untied": {"model_type": "gemma3_text", "head_dim": 16} | _UNTIED,
    "phi3": {"model_type": "phi3"} | _UNTIED | _TWO,
    "gpt2-tied": {"model_type": "gpt2", "n_positions": 16} | _TIED | _TWO,
    "gpt2-untied": {"model_type": "gpt2", "n_positions": 16, "n_inner": 48} | _UNTIED | _TWO,
    "gpt_neox": {"model_type": "gpt_neox"} | _TWO,
    "opt-tied": {"model_type": "opt", "ffn_dim": 48, "max_position_embeddings": 16} | _TIED | _TWO,
    "opt-post-norms-untied": {
        "model_type": "opt",
        "ffn_dim": 48,
        "max_position_embeddings": 16,
        "do_layer_norm_before": False,
    }
    | _UNTIED
    | _TWO,
    "opt-projected-post-norms": {
        "model_type": "opt",
        "ffn_dim": 48,
        "max_position_embeddings": 16,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    }
    | _TWO,
    "bert-tied": {"model_type": "bert", "max_position_embeddings": 16} | _TIED | _TWO,
    "roberta": {"model_type": "roberta", "max_position_embeddings": 16} | _TIED | _TWO,
    "electra-generator": {"model_type": "electra", "embedding_size": 16} | _TIED | _TWO,
    "electra-discriminator": {
        "model_type": "electra",
        "embedding_size": 32,
        "head": "PreTraining",
    }
    | _TWO,
    "modernbert-tied": {"model_type": "modernbert"} | _TIED | _TWO | _SPECIAL,
    "vit": {"model_type": "vit", "image_size": 16, "patch_size": 8} | _TWO,
    "mixtral": {"model_type": "mixtral", "num_local_experts": 3} | _EXPERTS,
    "qwen2-moe": {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 40} | _QWEN,
    "qwen3-moe-tied": {"model_type": "qwen3_moe", "head_dim": 8} | _TIED | _QWEN,
}
FAMILIES = DECODERS | OTHERS
_HEADS = {
    "bert": "MaskedLM",
    "roberta": "MaskedLM",
    "electra": "MaskedLM",
    "modernbert": "MaskedLM",
    "vit": "ImageClassification",
}


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """Build the tiny model of a family: `tiny("llama-tied", dtype=torch.float64)`."""
    return build


def build(
    family: str, *, dtype: torch.dtype = torch.float32, head: str | None = None
) -> PreTrainedModel:
    """Build the tiny model of a family, with its usual head or another: "" is none."""
    values = _SIZES | FAMILIES[family]
    usual = values.pop("head", _HEADS.get(values["model_type"], "CausalLM"))
    head = usual if head is None else head
    config = AutoConfig.for_model(**values)
    # grouped matrix products of experts exist for no float64
    config._experts_implementation = "eager" if dtype == torch.float64 else None
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    model = auto.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


@pytest.fixture(params=DECODERS)
def family(request: pytest.FixtureRequest) -> str:
    """Every kind of decoder with Llama's names: the tests that build them by hand need these."""
    return request.param


@pytest.fixture(params=FAMILIES)
def any_family(request: pytest.FixtureRequest) -> str:
    """Every family that has a table."""
    return request.param


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token ids, longer than the windows of the families."""
    return torch.arange(2 * 11).mul(7).remainder(64).view(2, 11)  # (B, S)


@pytest.fixture
def run(tokens: torch.Tensor) -> Callable[[PreTrainedModel], torch.Tensor]:
    """Return the logits of a model (the last state of one without a head) on fixed inputs."""
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))  # (B, C, H, W)

    def logits(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            if model.config.model_type == "vit":
                return model(pixel_values=pixels.to(model.dtype))[0]
            return model(input_ids=tokens)[0]

    return logits


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep float64 models in float64: transformers casts in norms and routers to float32."""
    cast, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def keeps(tensor: torch.Tensor, dtype: Any) -> bool:
        return tensor.dtype == torch.float64 and dtype == torch.float32

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if args and keeps(self, args[0]) else cast(self, *args, **kwargs)

    def in_double(scores: torch.Tensor, *args: Any, dtype: Any = None, **rest: Any) -> torch.Tensor:
        return softmax(scores, *args, dtype=None if keeps(scores, dtype) else dtype, **rest)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.to(torch.float32))
    monkeypatch.setattr(torch.nn.functional, "softmax", in_double)
