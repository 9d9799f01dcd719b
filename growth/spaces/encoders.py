"""Tables of encoders: of text, both ways, and of images."""

from __future__ import annotations

from .parts import Weights, layer_norm, linear
from .table import Architecture, Config, Weight


def _projected(config: Config) -> bool:
    return config["embedding_size"] != config["hidden_size"]


# the residual stream is normalised after each branch: what a norm writes, the next branch reads
_BERT_LAYER = {
    **linear("attention.self.query", "heads q_dim", "hidden", bias=""),
    **linear("attention.self.key", "heads k_dim", "hidden", bias=""),
    **linear("attention.self.value", "heads v_dim", "hidden", bias=""),
    **linear("attention.output.dense", "hidden", "heads v_dim", bias=""),
    **layer_norm("attention.output.LayerNorm", "hidden", "hidden"),
    **linear("intermediate.dense", "ffn", "hidden", bias=""),
    **linear("output.dense", "hidden", "ffn", bias=""),
    **layer_norm("output.LayerNorm", "hidden", "hidden"),
}


def _bert(model_type: str, shared: Weights, tied: tuple[tuple[str, ...], ...]) -> Architecture:
    embeddings = {
        f"{model_type}.embeddings.word_embeddings.weight": Weight(("vocab", "embedded")),
        f"{model_type}.embeddings.position_embeddings.weight": Weight(("positions", "embedded")),
        f"{model_type}.embeddings.token_type_embeddings.weight": Weight(("types", "embedded")),
        **layer_norm(f"{model_type}.embeddings.LayerNorm", "embedded", "embedded"),
        **linear(f"{model_type}.pooler.dense", "hidden", "hidden", bias="", optional=True),
    }
    return Architecture(
        (model_type,),
        _BERT_LAYER,
        embeddings | dict(shared),
        layer_prefix=f"{model_type}.encoder.layer.{{layer}}.",
        root=f"{model_type}.",
        tied=tied,
        derived=("position_ids", "token_type_ids"),
        norm="layer",
        post_norm=True,
        embedded="hidden",
        rotary=0.0,
        keys={"embedded": "embedding_size"} if model_type == "electra" else {},
    )


def _classifier(name: str, into: str = "hidden") -> dict[str, Weight]:
    return linear(name, "labels", into, bias="", optional=True)


BERT = _bert(
    "bert",
    {
        **linear("cls.predictions.transform.dense", "hidden", "hidden", bias="", optional=True),
        **layer_norm("cls.predictions.transform.LayerNorm", "final", "hidden", optional=True),
        **linear("cls.predictions.decoder", "vocab", "final", bias="", optional=True),
        "cls.predictions.bias": Weight(("vocab",), optional=True),
        **linear("cls.seq_relationship", "2", "hidden", bias="", optional=True),
        **_classifier("classifier"),
    },
    (
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    ),
)
ROBERTA = _bert(
    "roberta",
    {
        **linear("lm_head.dense", "hidden", "hidden", bias="", optional=True),
        **layer_norm("lm_head.layer_norm", "final", "hidden", optional=True),
        **linear("lm_head.decoder", "vocab", "final", bias="", optional=True),
        "lm_head.bias": Weight(("vocab",), optional=True),
        **linear("classifier.dense", "hidden", "hidden", bias="", optional=True),
        **_classifier("classifier.out_proj"),
    },
    (
        ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
        ("lm_head.bias", "lm_head.decoder.bias"),
    ),
)
ELECTRA = _bert(
    "electra",
    {
        **linear("electra.embeddings_project", "hidden", "embedded", bias="", when=_projected),
        **linear("discriminator_predictions.dense", "hidden", "hidden", bias="", optional=True),
        **linear("discriminator_predictions.dense_prediction", "1", "hidden", bias="",
                 optional=True),
        **linear("generator_predictions.dense", "embedded", "hidden", bias="", optional=True),
        **layer_norm("generator_predictions.LayerNorm", "read_embedded", "embedded",
                     optional=True),
        **linear("generator_lm_head", "vocab", "read_embedded", bias="", optional=True),
        **linear("classifier.dense", "hidden", "hidden", bias="", optional=True),
        **_classifier("classifier.out_proj"),
    },
    (("electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"),),
)  # fmt: skip

MODERNBERT = Architecture(
    ("modernbert",),
    {
        **layer_norm("attn_norm", "hidden", "stream", bias=False),
        **linear("attn.Wqkv", "heads q_dim | heads k_dim | heads v_dim", "hidden",
                 bias="attention_bias"),
        **linear("attn.Wo", "stream", "heads v_dim", bias="attention_bias", residual=True),
        **layer_norm("mlp_norm", "hidden", "stream", bias=False),
        **linear("mlp.Wi", "ffn | ffn", "hidden", bias="mlp_bias"),
        **linear("mlp.Wo", "stream", "ffn", bias="mlp_bias", residual=True),
    },
    {
        "model.embeddings.tok_embeddings.weight": Weight(("vocab", "embedded")),
        **layer_norm("model.embeddings.norm", "stream", "embedded", bias=False),
        **layer_norm("model.final_norm", "hidden", "stream", bias=False),
        **linear("head.dense", "hidden", "hidden", bias="classifier_bias", optional=True),
        **layer_norm("head.norm", "final", "hidden", bias=False, optional=True),
        **linear("decoder", "vocab", "final", bias="decoder_bias", optional=True),
        **_classifier("classifier", "final"),
    },
    # the embeddings end with a norm: the first layer has none before its attention
    first_layer={
        "attn_norm.weight": None,
        "attn.Wqkv.weight": Weight(
            ("heads q_dim | heads k_dim | heads v_dim", "<stream")
        ),
    },
    tied=(("model.embeddings.tok_embeddings.weight", "decoder.weight"),),
    norm="layer",
)  # fmt: skip

_VIT_NAMES = (
    (r"^vit\.layers\.(\d+)\.", r"vit.encoder.layer.\1."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
VIT = Architecture(
    ("vit",),
    {
        **layer_norm("layernorm_before", "hidden", "stream"),
        **linear("attention.attention.query", "heads q_dim", "hidden", bias="qkv_bias"),
        **linear("attention.attention.key", "heads k_dim", "hidden", bias="qkv_bias"),
        **linear("attention.attention.value", "heads v_dim", "hidden", bias="qkv_bias"),
        **linear("attention.output.dense", "stream", "heads v_dim", bias="", residual=True),
        **layer_norm("layernorm_after", "hidden", "stream"),
        **linear("intermediate.dense", "ffn", "hidden", bias=""),
        **linear("output.dense", "stream", "ffn", bias="", residual=True),
    },
    {
        "vit.embeddings.cls_token": Weight(("1", "1", "stream")),
        "vit.embeddings.mask_token": Weight(("1", "1", "stream"), optional=True),
        "vit.embeddings.position_embeddings": Weight(("1", "patches", "stream")),
        "vit.embeddings.patch_embeddings.projection.weight": Weight(
            ("stream", "channels", "patch", "patch")
        ),
        "vit.embeddings.patch_embeddings.projection.bias": Weight(("stream",)),
        **layer_norm("vit.layernorm", "hidden", "stream"),
        **linear("vit.pooler.dense", "hidden", "hidden", bias="", optional=True),
        **_classifier("classifier"),
    },
    layer_prefix="vit.encoder.layer.{layer}.",
    root="vit.",
    tied=(),
    in_memory=_VIT_NAMES,
    keys={"channels": "num_channels", "patch": "patch_size"},
    norm="layer",
    rotary=0.0,
)

TABLES = (BERT, ROBERTA, ELECTRA, MODERNBERT, VIT)
