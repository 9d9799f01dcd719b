"""A growth plan: which old tensors every new tensor is made of, and how spaces are mapped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from apical._extras import require

from .spaces import Architecture, architecture_of
from .spaces.sizes import config_sizes

if TYPE_CHECKING:
    # the command line shows its help without torch
    from .maps import SpaceMap

Terms = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Fill:
    """Random weights with which new directions are read, and noise on those of copies.

    Args:
        std: of normal numbers for what has no old weight, relative to that of the whole weight.
        noise: of normal numbers added to everything that is read more than once, likewise.
        seed: draws are a function of it and the tensor's name.
    """

    std: float = 0.0
    noise: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class LayerSource:
    """A new layer: the sum of `weight * old layer` over `terms`, with the weights `zero` set to 0.

    Args:
        terms: (old layer, weight) pairs; the first one also gives the layer's kind of attention.
        zero: names within the layer.
        own: name within the layer -> terms of its own, where they are not those of the layer.
        random: the layer has the shapes of its terms alone, and weights as before any training.
    """

    terms: Terms
    zero: tuple[str, ...] = ()
    own: Mapping[str, Terms] = field(default_factory=dict, hash=False)
    random: bool = False


class TensorSource(NamedTuple):
    """A new tensor: the sum of `weight * old tensor` over `terms`, before its axes are mapped.

    Args:
        terms: (old name, weight) pairs; empty: the gain of a norm that no old layer has, all 1.
        zero: of that shape, but set so that it adds nothing.
        random: of that shape, but as before any training.
    """

    terms: tuple[tuple[str, float], ...]
    zero: bool
    random: bool = False

    @property
    def is_new(self) -> bool:
        """Whether no old value is left, so that moments start anew."""
        return self.zero or self.random


@dataclass(frozen=True)
class GrowthPlan:
    """What an operator does to a model: a depth map, and one linear map per space.

    Args:
        operator: name of the operator, with its `options`.
        layers: one entry per layer of the grown model.
        spaces: space -> its map, for those that an operator chooses; what follows from them (what
            lies before a norm, say) is worked out by `widths.complete`.
        config: keys of the config that change beside those of depth and sizes.
        fill: what new directions are read with where their map says nothing.
        preserves_function: the grown model computes what the old one computes.
        notes: why it does not, one sentence each.

    Raises:
        ValueError: a plan without layers.
    """

    operator: str
    options: dict[str, Any]
    model_type: str
    layers: tuple[LayerSource, ...]
    spaces: dict[str, SpaceMap] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    fill: Fill | None = None
    preserves_function: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers or not all(layer.terms for layer in self.layers):
            raise ValueError("layers is empty or has a layer without terms; expected old layers")

    def sources(self, name: str) -> TensorSource:
        """Return what the tensor `name` of the grown model is made of.

        Raises:
            ValueError: the name belongs to a layer that the grown model does not have.
        """
        table = self._table()
        layer, inner = table.split(name)
        if layer is None:
            return TensorSource(((name, 1.0),), zero=False)
        if layer >= len(self.layers):
            raise ValueError(f"{name} is in no layer of the plan, which has {len(self.layers)}")
        source = self.layers[layer]
        there = _there(source.own.get(inner, source.terms), table, inner)
        terms = tuple((table.join(old, inner), weight) for old, weight in there)
        return TensorSource(terms, inner in source.zero, source.random)

    def sources_ahead(self, name: str) -> TensorSource:
        """Return what a tensor is made of, one old layer later; the last one has none later."""
        table = self._table()
        layer, inner = table.split(name)
        assert layer is not None
        last = max(old for source in self.layers for old, _ in source.terms)
        terms = tuple(
            (table.join(min(old + 1, last), inner), w) for old, w in self.layers[layer].terms
        )
        return TensorSource(terms, zero=False)

    def names(self, old_names: Iterable[str]) -> Iterator[str]:
        """Yield the tensor names of the grown model, from those of the old one, layer by layer."""
        table = self._table()
        inner_names: dict[int | None, list[str]] = {}
        for name in old_names:
            layer, inner = table.split(name)
            if not table.is_derived(name):
                inner_names.setdefault(layer, []).append(inner)
        yield from inner_names.get(None, [])
        for new, source in enumerate(self.layers):
            old = source.terms[0][0]
            special = [inner for inner in table.first_layer if _absent_first(table, inner)]
            kept = [inner for inner in inner_names[old] if new or inner not in special]
            added = special if new and not old else []
            yield from (table.join(new, inner) for inner in [*added, *kept])

    def config_changes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config keys that scale with depth and sizes, with their new values."""
        table = self._table()
        old_layers = [source.terms[0][0] for source in self.layers]
        changes: dict[str, Any] = {table.depth_key: len(self.layers)}
        for key in table.per_layer_keys:
            if config.get(key):
                changes[key] = [config[key][old] for old in old_layers]
        if config.get(table.window_key) is not None:
            # layers are counted from the front; per-layer lists, where present, say it exactly
            changes[table.window_key] = sum(old < config[table.window_key] for old in old_layers)
        sizes = {space: found.new for space, found in self.spaces.items()}
        return changes | config_sizes(table, config, sizes) | self.config

    def grown_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config (config.json as a dict) of the grown model."""
        return {**config, **self.config_changes(config)}

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as lists, dicts and scalars, for JSON or YAML."""
        layers = [
            {
                "terms": [list(term) for term in layer.terms],
                "zero": list(layer.zero),
                "random": layer.random,
                "own": {inner: [list(term) for term in own] for inner, own in layer.own.items()},
            }
            for layer in self.layers
        ]
        spaces = {space: found.to_dict() for space, found in self.spaces.items()}
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        fill = asdict(self.fill) if self.fill else None
        notes = list(self.notes)
        return plain | {"layers": layers, "spaces": spaces, "fill": fill, "notes": notes}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan that `to_dict` wrote.

        Raises:
            ValueError: keys are unknown or missing.
        """
        from .maps import SpaceMap

        if odd := set(data) ^ {field.name for field in fields(cls)}:
            raise ValueError(f"the plan's keys {sorted(odd)} are unknown or missing")
        layers = tuple(
            LayerSource(
                _terms(layer["terms"]),
                tuple(layer["zero"]),
                {inner: _terms(own) for inner, own in layer["own"].items()},
                layer["random"],
            )
            for layer in data["layers"]
        )
        spaces = {space: SpaceMap.from_dict(found) for space, found in data["spaces"].items()}
        fill = Fill(**data["fill"]) if data["fill"] else None
        parts = {"layers": layers, "spaces": spaces, "fill": fill, "notes": tuple(data["notes"])}
        return cls(**{**data, **parts})

    def to_yaml(self) -> str:
        """Return the plan as text, for `from_yaml`."""
        yaml = require("yaml", extra="hf", what="a plan as YAML")
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=100)

    @classmethod
    def from_yaml(cls, text: str) -> GrowthPlan:
        """Return the plan that `to_yaml` wrote.

        Raises:
            ValueError: the text is no YAML, or no plan.
        """
        yaml = require("yaml", extra="hf", what="a plan as YAML")
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"the plan is no YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise ValueError(f"the plan is a {type(data).__name__}; expected keys and values")
        return cls.from_dict(data)

    def inverse(self) -> GrowthPlan:
        """Return the plan that leads back: from a grown model to one of the old sizes.

        Old weights come back exactly where this plan copied them; where the grown model was trained
        since, each is the average of what was made of it.

        Raises:
            ValueError: this plan has lost or mixed something that nothing can bring back.
        """
        from .plan_algebra import inverse

        return inverse(self)

    def compose(self, following: GrowthPlan) -> GrowthPlan:
        """Return the plan that does this one first, then the following one, in one step.

        Raises:
            ValueError: they do not fit together, or no one plan says what both do.
        """
        from .plan_algebra import compose

        return compose(self, following)

    def diff(self, other: GrowthPlan) -> str:
        """Return what differs in another plan, one line each; empty if nothing does."""
        from .plan_text import differences

        return "\n".join(differences(self, other))

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan itself: like an operator, it can be given to `apical.grow`.

        Raises:
            ValueError: it was made for a model of another family or of other sizes.
        """
        table = self._table()
        if config.get("model_type") not in table.model_types:
            raise ValueError(
                f"the plan is for a {self.model_type}, the model is a {config.get('model_type')}"
            )
        old = 1 + max(layer for source in self.layers for layer, _ in source.terms)
        if config[table.depth_key] < old:
            raise ValueError(
                f"the plan is for {old} layers or more, the model has {config[table.depth_key]}"
            )
        sizes = table.sizes(config)
        for space, found in self.spaces.items():
            if sizes.get(space) != found.old:
                raise ValueError(
                    f"the plan is for {space} {found.old}, the model has {sizes.get(space)}"
                )
        return self

    def __str__(self) -> str:
        from .plan_text import table

        return table(self)

    def _table(self) -> Architecture:
        return architecture_of({"model_type": self.model_type})


def _terms(pairs: Iterable[tuple[int, float]]) -> Terms:
    return tuple((int(old), float(weight)) for old, weight in pairs)


def _there(terms: Terms, table: Architecture, inner: str) -> Terms:
    """Return the terms that have a tensor; without the first layer's, the others count for it."""
    if not _absent_first(table, inner):
        return terms
    total = sum(weight for _, weight in terms)
    there = [(old, weight) for old, weight in terms if old]
    left = sum(weight for _, weight in there)
    return tuple((old, weight * (total / left if left else 1.0)) for old, weight in there)


def _absent_first(table: Architecture, inner: str) -> bool:
    return inner in table.first_layer and table.first_layer[inner] is None


class Operator(Protocol):
    """A growth operator: builds the plan that grows a model with this config."""

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan: ...
