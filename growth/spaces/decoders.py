"""Tables of models that predict the next token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .parts import Config, Weights, layer_norm, linear
from .table import Architecture, Weight


def _classifier(into: str = "final") -> Weights:
    # of a sequence, or of each token, instead of the head over the vocabulary
    return linear("score", "labels", into, bias="", optional=True)


SHARED = {
    **_classifier(),
    "model.embed_tokens.weight": Weight(("vocab", "embedded")),
    "model.norm.weight": Weight(("final",), norm="stream"),
    "lm_head.weight": Weight(("vocab", "<final")),
}
PRE_NORMS = {
    "input_layernorm.weight": Weight(("hidden",), norm="stream"),
    "post_attention_layernorm.weight": Weight(("hidden",), norm="stream"),
}
QK_NORMS_PER_HEAD = {
    "self_attn.q_norm.weight": Weight(("q_dim",), norm="q_raw"),
    "self_attn.k_norm.weight": Weight(("k_dim",), norm="k_raw"),
}
_QK_NORMS_WHOLE = {
    "self_attn.q_norm.weight": Weight(("heads q_dim",), norm="heads_raw q_raw"),
    "self_attn.k_norm.weight": Weight(("kv_heads k_dim",), norm="kv_heads_raw k_raw"),
}
# an RMS norm ends each branch: zeroing the projection before it is exact too, but its gradient
# would pass through a division by sqrt(eps)
_POST_NORMS = {
    "post_attention_layernorm.weight": Weight(("stream",), residual=True, norm="stream"),
    "post_feedforward_layernorm.weight": Weight(("stream",), residual=True, norm="stream"),
}
_SANDWICH_NORMS = _POST_NORMS | {
    "input_layernorm.weight": Weight(("hidden",), norm="stream"),
    "pre_feedforward_layernorm.weight": Weight(("hidden",), norm="stream"),
}


def attention(
    norms: Weights, *, reads: str = "hidden", bias: str | None = None, o_bias: str | None = None
) -> Weights:
    """Return the weights of an attention with these norms in its layer."""
    query = norms.get("self_attn.q_norm.weight")
    q, k = "heads q_dim", "kv_heads k_dim"
    if query:  # what comes before a norm of queries and keys
        q, k = ("heads_raw q_raw", "kv_heads_raw k_raw") if "heads" in query.axes[0] else (
            "heads q_raw", "kv_heads k_raw")  # fmt: skip
    return {
        **linear("self_attn.q_proj", q, reads, bias=bias),
        **linear("self_attn.k_proj", k, reads, bias=bias),
        **linear("self_attn.v_proj", "kv_heads v_dim", reads, bias=bias),
        **linear("self_attn.o_proj", "stream", "heads v_dim", bias=o_bias, residual=_last(norms)),
    }


def _feed_forward(norms: Weights, *, reads: str, bias: str | None) -> Weights:
    return {
        **linear("mlp.gate_proj", "ffn", reads, bias=bias),
        **linear("mlp.up_proj", "ffn", reads, bias=bias),
        **linear("mlp.down_proj", "stream", "ffn", bias=bias, residual=_last(norms)),
    }


def _last(norms: Weights) -> bool:
    # a norm behind the branch writes to the residual stream; otherwise the last projection does
    return not any(norm.residual for norm in norms.values())


def _decoder(
    *model_types: str,
    norms: Weights = PRE_NORMS,
    qkv_bias: str | None = None,
    o_bias: str | None = None,
    mlp_bias: str | None = None,
    **rest: Any,
) -> Architecture:
    # without a norm before it, a branch reads the residual stream itself
    reads = "hidden" if "input_layernorm.weight" in norms else "stream"
    heads = attention(norms, reads=reads, bias=qkv_bias, o_bias=o_bias)
    layer = {**heads, **_feed_forward(norms, reads=reads, bias=mlp_bias), **norms}
    return Architecture(model_types, layer, SHARED, free_heads=True, **rest)


_GEMMA: Mapping[str, Any] = {
    "qkv_bias": "attention_bias",
    "o_bias": "attention_bias",
    "embedding_scale": True,
    "gain_offset": 1.0,
    "score_key": "query_pre_attn_scalar",
}

PHI3 = Architecture(
    ("phi3",),
    {
        **linear("self_attn.qkv_proj", "heads q_dim | kv_heads k_dim | kv_heads v_dim", "hidden"),
        **linear("self_attn.o_proj", "stream", "heads v_dim", residual=True),
        **linear("mlp.gate_up_proj", "ffn | ffn", "hidden"),
        **linear("mlp.down_proj", "stream", "ffn", residual=True),
        **PRE_NORMS,
    },
    SHARED,
    free_heads=True,
)

GPT2 = Architecture(
    ("gpt2",),
    {
        **layer_norm("ln_1", "hidden", "stream"),
        **linear("attn.c_attn", "heads q_dim | heads k_dim | heads v_dim", "hidden", bias="",
                 transposed=True),
        **linear("attn.c_proj", "stream", "heads v_dim", bias="", residual=True, transposed=True),
        **layer_norm("ln_2", "hidden", "stream"),
        **linear("mlp.c_fc", "ffn", "hidden", bias="", transposed=True),
        **linear("mlp.c_proj", "stream", "ffn", bias="", residual=True, transposed=True),
    },
    {
        **_classifier(),
        "transformer.wte.weight": Weight(("vocab", "embedded")),
        "transformer.wpe.weight": Weight(("positions", "stream")),
        **layer_norm("transformer.ln_f", "final", "stream"),
        "lm_head.weight": Weight(("vocab", "<final")),
    },
    layer_prefix="transformer.h.{layer}.",
    root="transformer.",
    tied=(("transformer.wte.weight", "lm_head.weight"),),
    derived=("attn.bias", "attn.masked_bias"),
    keys={"hidden": "n_embd", "heads": "n_head", "ffn": "n_inner", "positions": "n_positions"},
    depth_key="n_layer",
    norm="layer",
    rotary=0.0,
)  # fmt: skip

GPT_NEOX = Architecture(
    ("gpt_neox",),
    {
        **layer_norm("input_layernorm", "hidden", "stream"),
        **layer_norm("post_attention_layernorm", "hidden", "stream"),
        **linear("attention.query_key_value", "heads (q_dim | k_dim | v_dim)", "hidden",
                 bias="attention_bias"),
        **linear("attention.dense", "stream", "heads v_dim", bias="attention_bias", residual=True),
        **linear("mlp.dense_h_to_4h", "ffn", "hidden", bias=""),
        **linear("mlp.dense_4h_to_h", "stream", "ffn", bias="", residual=True),
    },
    {
        **_classifier(),
        "gpt_neox.embed_in.weight": Weight(("vocab", "embedded")),
        **layer_norm("gpt_neox.final_layer_norm", "final", "stream"),
        "embed_out.weight": Weight(("vocab", "<final")),
    },
    layer_prefix="gpt_neox.layers.{layer}.",
    root="gpt_neox.",
    tied=(("gpt_neox.embed_in.weight", "embed_out.weight"),),
    derived=("inv_freq", "attention.bias", "attention.masked_bias"),
    in_memory=((r"^lm_head\.", "embed_out."),),
    norm="layer",
    rotary=0.25,
)  # fmt: skip


def _projected(config: Config) -> bool:
    return config["word_embed_proj_dim"] != config["hidden_size"]


def _has_final_norm(config: Config) -> bool:
    return config["do_layer_norm_before"] and not config.get("_remove_final_layer_norm")


OPT = Architecture(
    ("opt",),
    {
        **layer_norm("self_attn_layer_norm", "hidden", "stream"),
        **linear("self_attn.q_proj", "heads q_dim", "hidden", bias="enable_bias"),
        **linear("self_attn.k_proj", "heads k_dim", "hidden", bias="enable_bias"),
        **linear("self_attn.v_proj", "heads v_dim", "hidden", bias="enable_bias"),
        **linear("self_attn.out_proj", "stream", "heads v_dim", bias="enable_bias", residual=True),
        **layer_norm("final_layer_norm", "hidden", "stream"),
        **linear("fc1", "ffn", "hidden", bias="enable_bias"),
        **linear("fc2", "stream", "ffn", bias="enable_bias", residual=True),
    },
    {
        **_classifier("read_embedded"),
        "model.decoder.embed_tokens.weight": Weight(("vocab", "embedded")),
        "model.decoder.embed_positions.weight": Weight(("2 | positions", "stream")),
        "model.decoder.project_in.weight": Weight(("stream", "<embedded"), when=_projected),
        "model.decoder.project_out.weight": Weight(("read_embedded", "<final"), when=_projected),
        **layer_norm("model.decoder.final_layer_norm", "final", "stream", when=_has_final_norm),
        "lm_head.weight": Weight(("vocab", "<read_embedded")),
    },
    layer_prefix="model.decoder.layers.{layer}.",
    tied=(("model.decoder.embed_tokens.weight", "lm_head.weight"),),
    keys={"ffn": "ffn_dim", "embedded": "word_embed_proj_dim"},
    norm="layer",
    post_norm="do_layer_norm_before",
    rotary=0.0,
)

TABLES = (
    _decoder("llama", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    _decoder("mistral"),
    _decoder("qwen2", qkv_bias=""),
    _decoder(
        "qwen3",
        norms=PRE_NORMS | QK_NORMS_PER_HEAD,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
    ),
    _decoder(
        "olmo2",
        norms=_POST_NORMS | _QK_NORMS_WHOLE,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
    ),
    _decoder("gemma2", norms=_SANDWICH_NORMS, **_GEMMA),
    _decoder("gemma3_text", norms=_SANDWICH_NORMS | QK_NORMS_PER_HEAD, **_GEMMA),
    PHI3,
    GPT2,
    GPT_NEOX,
    OPT,
)

# what the error about an unknown model shows; a test evaluates it
EXAMPLE = """\
    _decoder(  # q, k, v, o, gate, up, down projections; norms and biases differ by family
        "{}", norms=PRE_NORMS, qkv_bias="attention_bias", mlp_bias=None
    ),"""
