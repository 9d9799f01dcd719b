"""What a config says about the sizes of spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .table import Architecture

_HEAD = ("qk_dim", "v_dim")


def config_sizes(
    table: Architecture, config: Mapping[str, Any], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Return the config keys that say new sizes of spaces.

    Args:
        table: of the model's family.
        config: with its defaults filled in.
        sizes: space -> its new size; queries and values of a head need one size.

    Raises:
        ValueError: a config of this family cannot say them.
    """
    if not sizes:
        return {}
    old = table.sizes(config)
    if "hidden" in sizes and old["embedded"] == old["hidden"] and table.key_of("embedded", config):
        sizes = {"embedded": sizes["hidden"], **sizes}
    new = {**old, **sizes}
    head = {sizes.get(space, old["head_dim"]) for space in _HEAD}
    if len(head) > 1:
        raise ValueError(f"heads of queries and values have sizes {sorted(head)}; expected one")
    size = new["head_dim"] = head.pop()
    changes = {}
    for space in [space for space in sizes if space not in _HEAD]:
        key = table.key_of(space, config)
        if key is None:
            raise ValueError(f"a {config['model_type']} config has no key for {space}")
        changes[key] = sizes[space]
    changes |= _head_size(table, config, new, size)
    # what the config left to follow from another size
    follows = table.sizes({**config, **changes})
    for space in [space for space in old if follows[space] != new[space]]:
        if key := table.key_of(space, config):
            changes[key] = new[space]
    return changes


def _head_size(
    table: Architecture, config: Mapping[str, Any], new: Mapping[str, int], size: int
) -> dict[str, int]:
    key = table.key_of("head_dim", config)
    if key:
        return {key: size}
    if new["heads"] * size == new["hidden"]:
        return {}
    raise ValueError(
        f"{new['heads']} heads of {size} make {new['heads'] * size} of hidden size "
        f"{new['hidden']}; a {config['model_type']} needs equality: choose heads or head_dim"
    )
