"""Which axis of which weight of which architecture lives in which space: a table per family.

A space is a set of directions that must be grown together: hidden, ffn, heads, kv_heads, the
dimensions of a head, vocab, and layer (the depth). A new architecture is one more entry of
`TABLES`, in decoders.py, encoders.py or experts.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from . import decoders, encoders, experts
from .table import Architecture, Weight, first

__all__ = ["TABLES", "Architecture", "Weight", "architecture_of", "check_tensors"]

TABLES = (*decoders.TABLES, *encoders.TABLES, *experts.TABLES)


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
        f"model_type {model_type!r} has no table of weights; known: {known}. To add one, append to "
        f"TABLES in growth/spaces/decoders.py:\n{decoders.EXAMPLE.format(model_type)}"
    )


def check_tensors(
    config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], *, head: bool = True
) -> None:
    """Check that every tensor is in the table of its model and every weight of the table is there.

    Args:
        config: the config with its defaults filled in, as `PreTrainedConfig.to_dict` gives it.
        shapes: name -> shape of all tensors, by the names of whole models.
        head: the model has one.

    Raises:
        ValueError: tensors are unexpected or missing, or shapes disagree with the config.
    """
    table = architecture_of(config)
    weights, sizes = table.weights(config), table.sizes(config)
    tied = config.get("tie_word_embeddings")
    # one head is enough
    other_head = any(
        weight.optional and name in shapes and not name.startswith(table.root)
        for name, weight in weights.items()
    )
    unexpected = [n for n in shapes if n not in weights and not table.is_derived(n)]
    missing = [
        name
        for name, weight in weights.items()
        if name not in shapes
        and not weight.optional
        and (name.startswith(table.root) or (head and not other_head))
        and not (tied and any(other in shapes for other in table.tied_to(name)))
    ]
    wrong = [
        f"{name} {tuple(shapes[name])} instead of {weight.shape(sizes)}"
        for name, weight in weights.items()
        if name in shapes and tuple(shapes[name]) != weight.shape(sizes)
    ]
    faults = {"unexpected": unexpected, "missing": missing, "of another shape": wrong}
    if any(faults.values()):
        raise ValueError(
            f"the tensors are not those of a {config['model_type']} with "
            f"{config[table.depth_key]} layers: "
            + "; ".join(f"{len(n)} {what}: {first(n)}" for what, n in faults.items() if n)
        )
