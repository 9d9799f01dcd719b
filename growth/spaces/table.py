"""A table: the weights of a family of models, and what its spaces are called in its config."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .axes import parse

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Weight:
    """One weight: the spaces of its axes, and what its layer adds to the residual stream.

    Args:
        axes: one entry per axis of the tensor, in the notation of `axes.parse`.
        residual: with this weight zero, its branch adds exactly zero to the residual stream.
        when: the config key that must be true for the weight to exist, or a function of the config;
            empty: it always does.
        norm: for the gain of a norm: the axis whose statistics it divides by.
        optional: part of a head that only some models of the family have.
    """

    axes: tuple[str, ...]
    residual: bool = False
    when: str | Callable[[Config], bool] = ""
    norm: str = ""
    optional: bool = False

    def exists(self, config: Config) -> bool:
        """Return whether a model with this config has the weight (or may, if it is optional)."""
        if callable(self.when):
            return self.when(config)
        return not self.when or bool(config.get(self.when))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape where spaces have these sizes."""
        return tuple(parse(axis).size(sizes) for axis in self.axes)


@dataclass(frozen=True)
class Architecture:
    """The weights of a family of models, and the config keys that belong to its spaces.

    Names are those of stock checkpoints of a whole model.

    Args:
        model_types: of config.json.
        layer: name within a layer -> weight; `{expert}` stands for every expert's number.
        shared: name -> weight, outside of layers.
        first_layer: names within the first layer that are other weights there, or none.
        layer_prefix: how names of a layer begin.
        root: what names of the model without a head begin with; its checkpoints leave this out.
        tied: groups of names of one tensor when `tie_word_embeddings` is set.
        derived: tensors of old checkpoints that the model computes itself, by their last names.
        in_memory: (pattern, stock) pairs: regular expressions for names of parameters that differ
            from those of stock checkpoints, and what to put in their place.
        stacked: name within a layer of a parameter in memory, (experts, …) -> the stock tensors of
            one expert that lie one after the other on its next axis.
        keys: space -> config key of its size, where it is not as in Llama; `a|b`: one of them.
        depth_key: config key of the number of layers.
        per_layer_keys: config lists with one entry per layer.
        window_key: config key that counts the first layers with full attention.
        norm: "rms" or "layer".
        post_norm: the residual stream itself is normalised after each branch; or a config key
            that is false then.
        embedded: the space of the embedding's rows, where they are as long as the hidden state.
        embedding_scale: embeddings are multiplied by the square root of the hidden size.
        gain_offset: what norms add to their gain.
        score_key: config key that scales attention scores; empty: the size of a head does.
        rotary: share of a head's dimensions with rotary positions, if the config says nothing.
        free_heads: heads need not make up the hidden size; the config may say their own.
    """

    model_types: tuple[str, ...]
    layer: Mapping[str, Weight]
    shared: Mapping[str, Weight]
    first_layer: Mapping[str, Weight | None] = field(default_factory=dict)
    layer_prefix: str = "model.layers.{layer}."
    root: str = "model."
    tied: tuple[tuple[str, ...], ...] = (("model.embed_tokens.weight", "lm_head.weight"),)
    derived: tuple[str, ...] = ("inv_freq", "position_ids")
    in_memory: tuple[tuple[str, str], ...] = ()
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    depth_key: str = "num_hidden_layers"
    per_layer_keys: tuple[str, ...] = ("layer_types",)
    window_key: str = "max_window_layers"
    norm: str = "rms"
    post_norm: bool | str = False
    embedded: str = "stream"
    embedding_scale: bool = False
    gain_offset: float = 0.0
    score_key: str = ""
    rotary: float = 1.0
    free_heads: bool = False

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

    def stock_name(self, name: str) -> str:
        """Return what a stock checkpoint calls a parameter of the model in memory."""
        for pattern, stock in self.in_memory:
            name = re.sub(pattern, stock, name)
        return name

    def weight(self, name: str) -> Weight:
        """Return the weight that a tensor is.

        Raises:
            KeyError: it is none of this family.
        """
        layer, inner = self.split(name)
        if layer is None:
            return self.shared[inner]
        inner = re.sub(r"(?<=experts\.)\d+(?=\.)", "{expert}", inner)
        first = self.first_layer.get(inner) if layer == 0 else None
        return first or self.layer[inner]

    def weights(self, config: Config) -> dict[str, Weight]:
        """Return name -> weight of everything that a model with this config has, or may have."""
        found = dict(self.shared)
        for layer in range(config[self.depth_key]):
            inside = self.layer if layer else {**self.layer, **self.first_layer}
            for inner, weight in inside.items():
                for name in self._each_expert(inner, config):
                    found[self.join(layer, name)] = weight
        return {n: w for n, w in found.items() if w and w.exists(config)}

    def residual_weights(self, config: Config) -> tuple[str, ...]:
        """Return the names within a layer that must be zero for the layer to be the identity."""
        if self.is_post_norm(config):
            return ()
        return tuple(
            name
            for inner, weight in self.layer.items()
            if weight.residual and weight.exists(config)
            for name in self._each_expert(inner, config)
        )

    def sizes(self, config: Config) -> dict[str, int]:
        """Return the sizes of all spaces from a config with its defaults filled in."""
        keys = {space: self.key_of(space, config) for space in _KEYS | dict(self.keys)}
        found = {space: config[key] for space, key in keys.items() if key and config.get(key)}
        found.setdefault("kv_heads", found["heads"])
        found.setdefault("head_dim", found["hidden"] // found["heads"])
        found.setdefault("ffn", 4 * found["hidden"])
        found.setdefault("embedded", found["hidden"])
        found["labels"] = len(config.get("id2label") or ()) or config.get("num_labels", 2)
        if config.get("image_size"):
            found["patches"] = _patches(config)
        return {name: found[base] for name, base in SAME_SIZE.items() if base in found} | found

    def spaces(self) -> set[str]:
        """Return the names of all spaces that weights of the family have."""
        weights = [*self.layer.values(), *self.shared.values()]
        axes = {axis for weight in weights for axis in (*weight.axes, weight.norm) if axis}
        return {space for axis in axes for space in parse(axis).spaces()}

    def key_of(self, space: str, config: Config) -> str | None:
        """Return the config key of a space's size, None if the config has none."""
        keys = _KEYS | dict(self.keys)
        if space == "head_dim":
            return keys[space] if self.free_heads else None
        return next((k for k in keys.get(space, "").split("|") if k in config), None)

    def _each_expert(self, inner: str, config: Config) -> list[str]:
        if "{expert}" not in inner:
            return [inner]
        count = self.sizes(config)["experts"]
        return [inner.replace("{expert}", str(expert)) for expert in range(count)]

    def is_post_norm(self, config: Config) -> bool:
        """Return whether the residual stream itself is normalised."""
        if isinstance(self.post_norm, str):
            return not config[self.post_norm]
        return self.post_norm

    def is_derived(self, name: str) -> bool:
        """Return whether the model computes this tensor of old checkpoints itself."""
        return any(name.endswith(f".{last}") for last in self.derived)

    def tied_to(self, name: str) -> tuple[str, ...]:
        """Return the other names that the tensor `name` has where embeddings are tied."""
        return tuple(n for names in self.tied if name in names for n in names if n != name)


def _patches(config: Config) -> int:
    # the class token stands before those of the image, whose sides may be one number or two
    sides = [config[key] for key in ("image_size", "patch_size")]
    (height, width), (down, right) = ([s, s] if isinstance(s, int) else s for s in sides)
    return 1 + (height // down) * (width // right)


_KEYS = {
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
    "types": "type_vocab_size",
}

# spaces with the directions of another one, carried or read in another way
SAME_SIZE = {
    "stream": "hidden",  # before it is normalised
    "final": "hidden",  # what the output head reads
    "read_embedded": "embedded",  # what an output head reads that is no longer than embeddings
    "heads_raw": "heads",  # before queries and keys are normalised
    "kv_heads_raw": "kv_heads",
    "qk_dim": "head_dim",
    "q_dim": "head_dim",
    "k_dim": "head_dim",
    "q_raw": "head_dim",
    "k_raw": "head_dim",
    "v_dim": "head_dim",
}


def first(names: Iterable[str], count: int = 3) -> str:
    """Return the first names of a list, for a message."""
    names = list(names)
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
