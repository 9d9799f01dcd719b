"""Which axis of which weight of which architecture lives in which space.

A space is a set of directions that must be grown together: hidden, ffn, heads, kv_heads,
head_dim, vocab, and layer (the depth). An axis made of two spaces names both, slowest first:
the rows of `q_proj` are "heads head_dim". A new architecture is one more entry in `TABLES`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Weight:
    """One weight: the spaces of its axes, and what its layer adds to the residual stream.

    Args:
        axes: one entry per axis of the tensor; the spaces it is made of, slowest first.
        residual: with this weight zero, its branch adds exactly zero to the residual stream.
        when: the config key that must be true for the weight to exist; empty: it always does.
    """

    axes: tuple[str, ...]
    residual: bool = False
    when: str = ""


@dataclass(frozen=True)
class Architecture:
    """The weights of a family of models, and the config keys that belong to its spaces.

    Args:
        tied: names of one tensor when `tie_word_embeddings` is set; any one of them is enough.
        derived: tensors of a layer that old checkpoints hold and that the model computes itself.
        per_layer_keys: config lists with one entry per layer.
        window_key: config key that counts the first layers with full attention.
    """

    model_types: tuple[str, ...]
    layer: Mapping[str, Weight]
    shared: Mapping[str, Weight]
    layer_prefix: str = "model.layers.{layer}."
    tied: tuple[str, ...] = ("model.embed_tokens.weight", "lm_head.weight")
    derived: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    depth_key: str = "num_hidden_layers"
    per_layer_keys: tuple[str, ...] = ("layer_types",)
    window_key: str = "max_window_layers"

    def split(self, name: str) -> tuple[int | None, str]:
        """Return the layer of a tensor (None: it is in no layer) and its name within the layer."""
        head = self.layer_prefix.partition("{layer}")[0]
        number, _, inner = name.removeprefix(head).partition(".")
        if name.startswith(head) and number.isdecimal():
            return int(number), inner
        return None, name

    def join(self, layer: int, inner: str) -> str:
        """Return the full name of a tensor of a layer."""
        return self.layer_prefix.format(layer=layer) + inner

    def residual_weights(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names within a layer that must be zero for the layer to be the identity."""
        return tuple(name for name, w in self.layer.items() if w.residual and _exists(w, config))


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the table of a model from its config (config.json as a dict).

    Raises:
        NotImplementedError: no table has this model_type; the message shows how to add one.
        ValueError: `apical.sparsify` replaced layers of the model; no table has their weights.
    """
    if config.get("apical"):
        raise ValueError(
            "the model has sparse layers, which cannot grow; export it first: "
            "apical.export_dense(model), or `apical export-dense SRC OUT` for a directory"
        )
    model_type = config.get("model_type")
    for table in TABLES:
        if model_type in table.model_types:
            return table
    known = ", ".join(sorted(name for table in TABLES for name in table.model_types))
    raise NotImplementedError(
        f"model_type {model_type!r} has no table of weights; known: {known}. "
        f"To add one, append to TABLES in growth/spaces.py:\n{_EXAMPLE.format(model_type)}"
    )


def check_tensors(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that every tensor is in the table of its model and every weight of the table is there.

    Args:
        config: the config with its defaults filled in, as `PreTrainedConfig.to_dict` gives it.
        shapes: name -> shape of all tensors.

    Raises:
        ValueError: tensors are unexpected or missing, or shapes disagree with the config.
    """
    table = architecture_of(config)
    expected = _expected_shapes(table, config)
    unexpected = [n for n in shapes if n not in expected and not _derived(table, n)]
    found = config.get("tie_word_embeddings") and any(name in shapes for name in table.tied)
    missing = [n for n in expected if n not in shapes and not (found and n in table.tied)]
    wrong = [
        f"{name} {tuple(shapes[name])} instead of {expected[name]}"
        for name in expected
        if name in shapes and tuple(shapes[name]) != expected[name]
    ]
    faults = {"unexpected": unexpected, "missing": missing, "of another shape": wrong}
    if any(faults.values()):
        depth = config[table.depth_key]
        raise ValueError(
            f"the tensors are not those of a {config['model_type']} with {depth} layers: "
            + "; ".join(f"{len(n)} {what}: {_first(n)}" for what, n in faults.items() if n)
        )


def _expected_shapes(table: Architecture, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    sizes = _space_sizes(config)
    weights = dict(table.shared)
    for layer in range(config[table.depth_key]):
        weights |= {table.join(layer, inner): w for inner, w in table.layer.items()}
    return {
        name: tuple(math.prod(sizes[space] for space in axis.split()) for axis in w.axes)
        for name, w in weights.items()
        if _exists(w, config)
    }


def _space_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    heads = config["num_attention_heads"]
    return {
        "hidden": config["hidden_size"],
        "ffn": config["intermediate_size"],
        "heads": heads,
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "vocab": config["vocab_size"],
    }


def _exists(weight: Weight, config: Mapping[str, Any]) -> bool:
    return not weight.when or bool(config.get(weight.when))


def _derived(table: Architecture, name: str) -> bool:
    return table.split(name)[1] in table.derived


def _first(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _linear(
    name: str, out: str, into: str, *, bias: str | None, residual: bool = False
) -> dict[str, Weight]:
    # bias: None = none, "" = always, else the config key that switches it on
    weights = {f"{name}.weight": Weight((out, into), residual)}
    if bias is not None:
        weights[f"{name}.bias"] = Weight((out,), residual, bias)
    return weights


def _decoder(
    *model_types: str,
    norms: Mapping[str, Weight],
    qkv_bias: str | None = None,
    o_bias: str | None = None,
    mlp_bias: str | None = None,
) -> Architecture:
    # a norm behind the branch writes to the residual stream; otherwise the last projection does
    last = not any(norm.residual for norm in norms.values())
    layer = {
        **_linear("self_attn.q_proj", "heads head_dim", "hidden", bias=qkv_bias),
        **_linear("self_attn.k_proj", "kv_heads head_dim", "hidden", bias=qkv_bias),
        **_linear("self_attn.v_proj", "kv_heads head_dim", "hidden", bias=qkv_bias),
        **_linear("self_attn.o_proj", "hidden", "heads head_dim", bias=o_bias, residual=last),
        **_linear("mlp.gate_proj", "ffn", "hidden", bias=mlp_bias),
        **_linear("mlp.up_proj", "ffn", "hidden", bias=mlp_bias),
        **_linear("mlp.down_proj", "hidden", "ffn", bias=mlp_bias, residual=last),
        **norms,
    }
    return Architecture(model_types, layer, _SHARED)


_SHARED = {
    "model.embed_tokens.weight": Weight(("vocab", "hidden")),
    "model.norm.weight": Weight(("hidden",)),
    "lm_head.weight": Weight(("vocab", "hidden")),
}
_PRE_NORMS = {
    "input_layernorm.weight": Weight(("hidden",)),
    "post_attention_layernorm.weight": Weight(("hidden",)),
}
_QK_NORMS_PER_HEAD = {
    "self_attn.q_norm.weight": Weight(("head_dim",)),
    "self_attn.k_norm.weight": Weight(("head_dim",)),
}
_QK_NORMS_WHOLE = {
    "self_attn.q_norm.weight": Weight(("heads head_dim",)),
    "self_attn.k_norm.weight": Weight(("kv_heads head_dim",)),
}
# an RMS norm ends each branch: zeroing the projection before it is exact too, but its gradient
# would pass through a division by sqrt(eps)
_POST_NORMS = {
    "post_attention_layernorm.weight": Weight(("hidden",), residual=True),
    "post_feedforward_layernorm.weight": Weight(("hidden",), residual=True),
}

TABLES = (
    _decoder(
        "llama",
        norms=_PRE_NORMS,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    _decoder("mistral", norms=_PRE_NORMS),
    _decoder("qwen2", norms=_PRE_NORMS, qkv_bias=""),
    _decoder(
        "qwen3",
        norms=_PRE_NORMS | _QK_NORMS_PER_HEAD,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
    ),
    _decoder(
        "olmo2",
        norms=_POST_NORMS | _QK_NORMS_WHOLE,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
    ),
)

# what the error about an unknown model shows; a test evaluates it
_EXAMPLE = """\
    _decoder(  # q, k, v, o, gate, up, down projections; norms and biases differ by family
        "{}", norms=_PRE_NORMS, qkv_bias="attention_bias", mlp_bias=None
    ),"""
