import copy

import pytest
import torch
import transformers

_SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # large weights: what a token attends to must show in what it predicts
    "initializer_range": 0.3,
}
_GROUPED = _SHAPE | {"num_key_value_heads": 2}
_MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
# the configuration's class, the model's class, options
_MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", _GROUPED | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GROUPED | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GROUPED | {"head_dim": 16}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _GROUPED),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _GROUPED),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
        | {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _SHAPE),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {"vocab_size": 61, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
        | {
            "dropout": 0.0,
            "init_std": 0.3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        _SHAPE | {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
    ),
    # the one masked family whose head may do without a bias; every layer global
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        _SHAPE | {"decoder_bias": False, "global_attn_every_n_layers": 1},
    ),
    # every third layer is global
    "modernbert-window": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        _SHAPE | {"decoder_bias": False, "local_attention": 4, "num_hidden_layers": 3},
    ),
    # windows are shorter than the rows of `batch`
    "mistral-window": ("MistralConfig", "MistralForCausalLM", _GROUPED | {"sliding_window": 4}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GROUPED | _MIXED | {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GROUPED | _MIXED | {"head_dim": 8}),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        _GROUPED | _MIXED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _GROUPED | {"num_local_experts": 4}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _SHAPE),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
        | {"max_position_embeddings": 32, "initializer_range": 0.3}
        | {"dropout": 0.0, "attention_dropout": 0.0},
    ),
    "bart": (
        "BartConfig",
        "BartForCausalLM",
        {"vocab_size": 61, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
        | {"decoder_ffn_dim": 48, "max_position_embeddings": 32, "init_std": 0.3, "dropout": 0.0},
    ),
    "granite": ("GraniteConfig", "GraniteForCausalLM", _GROUPED),
    "cohere": ("CohereConfig", "CohereForCausalLM", _GROUPED),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": 61, "hidden_size": 32, "n_head": 4},
    ),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", _GROUPED),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        _GROUPED | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        _GROUPED | {"num_experts": 2, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "mobilebert": (
        "MobileBertConfig",
        "MobileBertForMaskedLM",
        _SHAPE | {"hidden_size": 64, "embedding_size": 32, "intra_bottleneck_size": 32},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
    ),
}
_CAUSAL = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "olmo2", "phi3"]
_CAUSAL += ["gpt2", "gpt_neox", "opt"]


@pytest.fixture
def build():
    """Return a function that builds one small random model, the same one for the same name."""

    def build_model(name: str, dtype: torch.dtype = torch.float32, **options):
        config_class, model_class, defaults = _MODELS[name]
        config = getattr(transformers, config_class)(**defaults | options)
        torch.manual_seed(1)
        return getattr(transformers, model_class)(config).to(dtype).eval()

    return build_model


@pytest.fixture(params=_CAUSAL)
def causal(request) -> str:
    """Name of a causal family whose attention and loss are both replaced."""
    return request.param


@pytest.fixture
def pair(build):
    """Return a function that builds a stock model and an equal one with the kernels in."""
    from apical.hf import use_kernels

    def build_pair(name: str, dtype: torch.dtype = torch.float32, **options):
        stock = build(name, dtype, **options)
        return stock, use_kernels(copy.deepcopy(stock))

    return build_pair


@pytest.fixture
def checkpointed():
    """Return a function that turns gradient checkpointing on and returns the model."""

    def enable(model, *, reentrant: bool = False):
        # the second name is that of older versions
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        name = next(name for name in names if hasattr(model, name))
        getattr(model, name)({"use_reentrant": reentrant})
        return model

    return enable


@pytest.fixture
def batch():
    """Return a function that builds a batch of two rows of twelve tokens: inputs and labels.

    Kinds: full; left, right (padded rows); hole (padding inside a row); packed (positions that
    restart, other places in each row).
    """

    def build_batch(kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(3, 61, (2, 12), generator=generator)
        labels = ids.clone()
        if kind == "full":
            return {"input_ids": ids}, labels
        if kind == "packed":
            positions = [[5, 7], [4, 1, 7]]
            rows = [torch.cat([torch.arange(n) for n in lengths]) for lengths in positions]
            position_ids = torch.stack(rows)
            labels[position_ids == 0] = -100
            return {"input_ids": ids, "position_ids": position_ids}, labels
        mask = torch.ones_like(ids)
        mask[0, {"left": slice(0, 4), "right": slice(8, 12), "hole": slice(3, 5)}[kind]] = 0
        labels[mask == 0] = -100
        if kind != "right":
            # what padding predicts is nobody's business
            labels[0, {"left": 4, "hole": 5}[kind]] = -100
        return {"input_ids": ids, "attention_mask": mask}, labels

    return build_batch
