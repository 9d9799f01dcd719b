"""The sizes of a wider model, from what was asked for."""

from collections.abc import Mapping
from typing import Any

from ..spaces import Architecture

_FEED_FORWARD = ("ffn", "moe_ffn", "shared_ffn")
_ALL = ("hidden", *_FEED_FORWARD, "heads", "kv_heads")


def wider_sizes(
    table: Architecture,
    config: Mapping[str, Any],
    factor: float | None,
    asked: Mapping[str, int | None],
) -> dict[str, int]:
    """Return the sizes of all spaces of the wider model that its family has, and of head_dim.

    Args:
        table, config: of the model before it grows.
        factor: multiplies all but head_dim; 2 if nothing is asked for.
        asked: space -> size, None where it follows from the factor or stays.

    Raises:
        ValueError: a size shrinks or is no integer, heads do not divide, or there is no such space.
    """
    old, there = table.sizes(config), table.spaces()
    spaces = [space for space in _ALL if space not in _FEED_FORWARD or space in there]
    if odd := [space for space in asked if asked[space] and space not in (*spaces, "head_dim")]:
        has = ", ".join(space for space in spaces if space in _FEED_FORWARD)
        raise ValueError(f"a {config['model_type']} has no {odd[0]} to widen; it has {has}")
    if factor is None and not any(asked.values()):
        factor = 2
    new = {space: asked[space] or _times(old[space], factor, space) for space in spaces}
    new["head_dim"] = asked["head_dim"] or old["head_dim"]
    if table.key_of("head_dim", config) is None:
        _match_heads(old, new, asked)
    if table.key_of("kv_heads", config) is None:
        new["kv_heads"] = new["heads"]
    for space, size in new.items():
        if size < old[space]:
            raise ValueError(f"{space} would shrink from {old[space]} to {size}; expected more")
    if new["heads"] % new["kv_heads"]:
        raise ValueError(
            f"{new['heads']} heads cannot share {new['kv_heads']} kv_heads; expected a multiple"
        )
    return new


def _times(old: int, factor: float | None, space: str) -> int:
    size = old * (1 if factor is None else factor)
    if size != int(size):
        raise ValueError(
            f"factor {factor:g} makes {space} {size:g} of {old}; expected an integer: give {space}"
        )
    return int(size)


def _match_heads(
    old: Mapping[str, int], new: dict[str, int], asked: Mapping[str, int | None]
) -> None:
    # this family's heads have hidden / heads dimensions, and nothing else
    if not asked["hidden"] and (asked["heads"] or asked["head_dim"]):
        new["hidden"] = new["heads"] * new["head_dim"]
    if not asked["heads"] and not asked["head_dim"]:
        new["heads"] = new["hidden"] // new["head_dim"]
    if new["heads"] * new["head_dim"] != new["hidden"]:
        raise ValueError(
            f"{new['heads']} heads of {new['head_dim']} make {new['heads'] * new['head_dim']}, not "
            f"hidden size {new['hidden']}; this family needs equality"
        )
