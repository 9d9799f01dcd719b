"""A growth plan: which old tensors every new tensor is made of. Pure data, no tensors."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, Protocol

from .spaces import Architecture, architecture_of

_MAX_ROWS = 12  # of the printed table


@dataclass(frozen=True)
class LayerSource:
    """A new layer: the sum of `weight * old layer` over `terms`, with the weights `zero` set to 0.

    Args:
        terms: (old layer, weight) pairs; the first one also gives the layer's kind of attention.
        zero: names within the layer.
    """

    terms: tuple[tuple[int, float], ...]
    zero: tuple[str, ...] = ()


class TensorSource(NamedTuple):
    """A new tensor: the sum of `weight * old tensor` over `terms`, or zeros of that shape."""

    terms: tuple[tuple[str, float], ...]
    zero: bool


@dataclass(frozen=True)
class GrowthPlan:
    """What an operator does to a model: a depth map, and one linear map per space.

    Args:
        operator: name of the operator, with its `options`.
        layers: one entry per layer of the grown model.
        spaces: space -> linear map; a space that is absent keeps its identity.
        preserves_function: the grown model computes what the old one computes.

    Raises:
        ValueError: a plan without layers, or with a map that no operator makes.
    """

    operator: str
    options: dict[str, Any]
    model_type: str
    layers: tuple[LayerSource, ...]
    spaces: dict[str, Any] = field(default_factory=dict)
    preserves_function: bool = False

    def __post_init__(self) -> None:
        if not self.layers or not all(layer.terms for layer in self.layers):
            raise ValueError("layers is empty or has a layer without terms; expected old layers")
        if self.spaces:
            raise ValueError(f"spaces maps {sorted(self.spaces)}; expected none: only depth grows")

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
        terms = tuple((table.join(old, inner), weight) for old, weight in source.terms)
        return TensorSource(terms, inner in source.zero)

    def names(self, old_names: Iterable[str]) -> Iterator[str]:
        """Yield the tensor names of the grown model, from those of the old one, layer by layer."""
        table = self._table()
        inner_names: dict[int | None, list[str]] = {}
        for name in old_names:
            layer, inner = table.split(name)
            if inner not in table.derived:
                inner_names.setdefault(layer, []).append(inner)
        yield from inner_names.get(None, [])
        for new, source in enumerate(self.layers):
            yield from (table.join(new, inner) for inner in inner_names[source.terms[0][0]])

    def config_changes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config keys that scale with depth, with their new values."""
        table = self._table()
        old_layers = [source.terms[0][0] for source in self.layers]
        changes: dict[str, Any] = {table.depth_key: len(self.layers)}
        for key in table.per_layer_keys:
            if config.get(key):
                changes[key] = [config[key][old] for old in old_layers]
        if config.get(table.window_key) is not None:
            # layers are counted from the front; per-layer lists, where present, say it exactly
            changes[table.window_key] = sum(old < config[table.window_key] for old in old_layers)
        return changes

    def grown_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config (config.json as a dict) of the grown model."""
        return {**config, **self.config_changes(config)}

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as lists, dicts and scalars, for JSON or YAML."""
        layers = [
            {"terms": [list(term) for term in layer.terms], "zero": list(layer.zero)}
            for layer in self.layers
        ]
        return {**asdict(self), "layers": layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "GrowthPlan":
        """Return the plan that `to_dict` wrote.

        Raises:
            ValueError: keys are unknown or missing.
        """
        if odd := set(data) ^ {field.name for field in fields(cls)}:
            raise ValueError(f"the plan's keys {sorted(odd)} are unknown or missing")
        layers = tuple(
            LayerSource(
                tuple((int(old), float(weight)) for old, weight in layer["terms"]),
                tuple(layer["zero"]),
            )
            for layer in data["layers"]
        )
        return cls(**{**data, "layers": layers})

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        used = len({old for layer in self.layers for old, _ in layer.terms})
        kept = "is preserved" if self.preserves_function else "changes"
        title = (
            f"{self.operator}({options}): {self.model_type}, {len(self.layers)} layers "
            f"from {used}; the function {kept}"
        )
        rows = [_row(first, last, self.layers) for first, last in _runs(self.layers)]
        if len(rows) > _MAX_ROWS:
            rows[_MAX_ROWS - 2 : -1] = [("…", f"{len(rows) - _MAX_ROWS + 1} more", "")]
        lines = [f"{new:>9}  {old:<11}  {zero}".rstrip() for new, old, zero in rows]
        return "\n".join([title, "new layer  old layer    set to zero", *lines])

    def _table(self) -> Architecture:
        return architecture_of({"model_type": self.model_type})


class Operator(Protocol):
    """A growth operator: builds the plan that grows a model with this config."""

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan: ...


def _runs(layers: tuple[LayerSource, ...]) -> list[tuple[int, int]]:
    """Return (first, last) of the runs of new layers whose old layers count up one by one."""
    starts = [new for new in range(1, len(layers)) if not _follows(layers[new], layers[new - 1])]
    return [
        (first, after - 1)
        for first, after in zip([0, *starts], [*starts, len(layers)], strict=True)
    ]


def _follows(layer: LayerSource, before: LayerSource) -> bool:
    counted_up = tuple((old + 1, weight) for old, weight in before.terms)
    return layer.zero == before.zero and layer.terms == counted_up


def _row(first: int, last: int, layers: tuple[LayerSource, ...]) -> tuple[str, str, str]:
    new = f"{first}" if first == last else f"{first}-{last}"
    old = " + ".join(
        (f"{a}" if first == last else f"{a}-{b}") + ("" if weight == 1 else f" × {weight:g}")
        for (a, weight), (b, _) in zip(layers[first].terms, layers[last].terms, strict=True)
    )
    return new, old, ", ".join(layers[first].zero)
