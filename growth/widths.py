"""The maps of all spaces of a family, from those that an operator chose; whether they are exact.

An operator maps `hidden`, `ffn`, `heads`, `kv_heads`, `qk_dim`, `v_dim`, `vocab`, … What lies
before a norm, behind the last one, or is queried follows from these: once for all operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .maps import LinearMap, SpaceMap
from .spaces import Architecture

Maps = Mapping[str, SpaceMap]


def complete(table: Architecture, config: Mapping[str, Any], chosen: Maps) -> dict[str, SpaceMap]:
    """Return the maps of all spaces that change.

    Args:
        table: of the model's family.
        config: of the model before it grows, with its defaults filled in.
        chosen: the maps of spaces that operators choose.
    """
    maps, sizes = dict(chosen), table.sizes(config)
    tied = bool(config.get("tie_word_embeddings"))
    if "hidden" in chosen:
        _complete_hidden(maps, table, config)
        if sizes["embedded"] == sizes["hidden"]:
            maps.setdefault("embedded", _embedded(maps[table.embedded], table))
            maps["final"] = read_by(maps["embedded"], maps["hidden"]) if tied else maps["hidden"]
            maps["read_embedded"] = maps["final"]
        else:
            maps["final"] = maps["hidden"]
    if "embedded" in maps:
        embedded = maps["embedded"]
        maps.setdefault("read_embedded", read_by(embedded, embedded) if tied else embedded)
    for base in ("heads", "kv_heads"):
        if base in chosen:
            maps[f"{base}_raw"] = before_rms(chosen[base])
    if "qk_dim" in chosen:
        _complete_scores(maps, table)
    return maps


def _complete_hidden(
    maps: dict[str, SpaceMap], table: Architecture, config: Mapping[str, Any]
) -> None:
    hidden = maps["hidden"]
    raw = before_rms if table.norm == "rms" else before_layer_norm
    maps["stream"] = hidden if table.is_post_norm(config) else raw(hidden)


def _embedded(space: SpaceMap, table: Architecture) -> SpaceMap:
    if not table.embedding_scale:
        return space
    shrink = math.sqrt(space.old / space.new)
    return SpaceMap(space.carries.scaled(shrink), space.reads.scaled(1 / shrink), space.ahead)


def _complete_scores(maps: dict[str, SpaceMap], table: Architecture) -> None:
    qk = maps["qk_dim"]
    # scores are divided by the square root of a longer head
    scale = 1.0 if table.score_key else math.sqrt(qk.new / qk.old)
    maps["q_dim"] = SpaceMap(qk.carries.scaled(scale), qk.reads.scaled(1 / scale))
    maps["k_dim"] = SpaceMap(qk.reads, qk.carries)
    maps["q_raw"] = before_rms(qk)
    maps["k_raw"] = before_rms(maps["k_dim"])


def before_rms(space: SpaceMap) -> SpaceMap:
    """Return the map of a space before an RMS norm: the mean of squares stays what it was.

    An old direction with c copies has each of them times sqrt(new / old / c).
    """
    if space.new < space.old:
        return _shrunk(space, before_rms)
    carries = space.carries
    if not carries.selects:
        return _before_rms_mixed(space)
    copies = torch.bincount(carries.column, minlength=space.old).double()
    amplitude = (space.new / space.old / copies).sqrt()
    found = _with_amplitude(space, amplitude[carries.column])
    return SpaceMap(found.carries, found.reads, found.ahead, amplitude)


def _before_rms_mixed(space: SpaceMap) -> SpaceMap:
    # squares of a direction's weights count as its copies; exact where directions do not mix
    carries, reads = space.carries, space.reads
    squares = carries.weight.new_zeros(space.old).index_add_(0, carries.column, carries.weight**2)
    amplitude = (space.new / space.old / squares).sqrt()
    before = [
        LinearMap(m.new, m.old, m.row, m.column, m.weight * factor[m.column])
        for m, factor in ((carries, amplitude), (reads, 1 / amplitude))
    ]
    return SpaceMap(before[0], before[1], space.ahead, amplitude)


def before_layer_norm(space: SpaceMap) -> SpaceMap:
    """Return the map of a space before a layer norm: mean and variance stay what they were.

    Copies of every direction, equally many, change neither. New directions that carry nothing
    after the norm carry the mean before it, and all are times sqrt(new / old).

    Source: LEMON, arXiv 2310.07999, for the mean; the factor, which leaves epsilon alone, is ours.
    """
    if space.new < space.old:
        return _shrunk(space, before_layer_norm)
    counts = torch.bincount(space.carries.column, minlength=space.old)
    if not space.carries.selects or not bool((counts == 1).all()) or space.new == space.old:
        return space
    factor = math.sqrt(space.new / space.old)
    found = _with_amplitude(space, torch.full((space.old,), factor, dtype=torch.float64))
    matrix = found.carries.matrix()
    matrix[space.carries.sources() < 0] = factor / space.old
    return SpaceMap(LinearMap.dense(matrix), found.reads, space.ahead)


def read_by(embedded: SpaceMap, base: SpaceMap) -> SpaceMap:
    """Return the map of a space that embeddings read: what it carries undoes their weights."""
    if base.new < base.old:
        back = base.inverse()
        row, column = back.carries.row, back.carries.column
        found = read_by(embedded.inverse(), back)
        # what carries nothing behind the norm has no gain to mix in
        reads = LinearMap(back.new, back.old, row, column, found.reads.at(row, column))
        return SpaceMap(reads.transposed(), found.carries.transposed())
    weights, entries = embedded.carries, base.carries
    at = weights.at(entries.row, entries.column)
    total = torch.zeros(base.old, dtype=torch.float64).index_add_(0, entries.column, at**2)
    carries = LinearMap(base.new, base.old, entries.row, entries.column, at / total[entries.column])
    return SpaceMap(carries, weights, base.ahead)


def _shrunk(space: SpaceMap, rule: Callable[[SpaceMap], SpaceMap]) -> SpaceMap:
    # what undoes the map of the space that undoes the one before the norm
    back = space.inverse()
    before = rule(back)
    row, column = back.carries.row, back.carries.column
    amplitude = torch.ones(space.old, dtype=torch.float64)
    amplitude[row] = back.carries.weight / before.carries.at(row, column)
    found = before.inverse()
    return SpaceMap(found.carries, found.reads, amplitude=amplitude)


def _with_amplitude(space: SpaceMap, amplitude: Tensor) -> SpaceMap:
    # amplitude: one per entry of carries; carries times reads stays the same
    carries = space.carries
    full = torch.ones(space.new, dtype=torch.float64)
    full[carries.row] = carries.weight / amplitude
    found = LinearMap(space.new, space.old, carries.row, carries.column, amplitude)
    return SpaceMap(found, space.reads.scaled(full), space.ahead)


def faults(table: Architecture, config: Mapping[str, Any], chosen: Maps) -> list[str]:
    """Return why a grown model does not compute what the old one does; empty: it does.

    Args:
        table, config, chosen: as of `complete`.
    """
    maps, found = complete(table, config, chosen), []
    for space, map_ in maps.items():
        if map_.ahead is not None:
            found.append(f"{space}: new directions come from the next layer")
        elif space not in _SCORES and map_.error() > _EXACT:
            found.append(f"{space}: what is read is not what was written")
    if "hidden" in chosen:
        found += _norm_faults(table, config, maps)
        found += _head_faults(table, config, maps)
    if "heads" in chosen or "kv_heads" in chosen:
        found += _group_faults(table.sizes(config), chosen)
    if "qk_dim" in chosen:
        found += _rotary_faults(table, config, chosen["qk_dim"])
    return found


_EXACT = 1e-12
# queries and keys meet each other, and no weight
_SCORES = ("q_dim", "k_dim", "q_raw", "k_raw")


def _norm_faults(table: Architecture, config: Mapping[str, Any], maps: Maps) -> list[str]:
    if table.norm == "rms":
        return []
    hidden = maps["hidden"]
    counts = torch.bincount(hidden.carries.column, minlength=hidden.old)
    even = bool((counts == hidden.new / hidden.old).all()) and bool(
        (hidden.carries.weight == 1).all()
    )
    if even or (not _writes_norm(table, config) and bool((counts == 1).all())):
        return []
    why = "the stream itself is normalised" if _writes_norm(table, config) else "copies are uneven"
    return [
        f"hidden: a layer norm of {hidden.new} directions has another mean and variance than one "
        f"of {hidden.old}, since {why}; a multiple of {hidden.old} by equal copies keeps them"
    ]


def _head_faults(table: Architecture, config: Mapping[str, Any], maps: Maps) -> list[str]:
    writes = (w for w in table.shared.values() if w.norm and w.exists(config))
    same = maps["final"].carries == maps["hidden"].carries
    if same or any(w.axes[0] in ("final", "read_embedded") for w in writes):
        return []
    return ["hidden: no norm before the tied head can undo that embeddings are read in copies"]


def _writes_norm(table: Architecture, config: Mapping[str, Any]) -> bool:
    # no norm can write the mean of its own results
    shared = (w.norm and w.axes[0] == "stream" for w in table.shared.values())
    return table.is_post_norm(config) or any(shared)


def _group_faults(sizes: Mapping[str, int], chosen: Maps) -> list[str]:
    def sources(space: str) -> list[int]:
        if space in chosen:
            return chosen[space].carries.sources().tolist()
        return list(range(sizes[space]))

    if sizes["kv_heads"] == sizes["heads"] and "kv_heads" not in chosen:
        return []
    heads, kv_heads = sources("heads"), sources("kv_heads")
    old, new = sizes["heads"] // sizes["kv_heads"], len(heads) // len(kv_heads)
    wrong = [h for i, h in enumerate(heads) if h >= 0 and kv_heads[i // new] != h // old]
    if not wrong:
        return []
    return [f"heads: the queries of old head {wrong[0]} meet keys that are not its own"]


def _rotary_faults(table: Architecture, config: Mapping[str, Any], map_: SpaceMap) -> list[str]:
    source, share = map_.carries.sources().tolist(), rotary_share(table, config)
    slots = rotary_sources(map_.old, map_.new, share)
    if not share or all(a in (-1, b) for a, b in zip(source, slots, strict=True)):
        return []
    return ["qk_dim: rotary positions turn the copies of a direction at another frequency"]


def rotary_share(table: Architecture, config: Mapping[str, Any]) -> float:
    """Return the share of a head's dimensions that rotary positions turn."""
    rope = config.get("rope_parameters") or {}
    return rope.get("partial_rotary_factor", table.rotary) if table.rotary else 0.0


def rotary_sources(old: int, new: int, share: float) -> list[int]:
    """Return the old dimension that has the frequency of each new one; -1: none has.

    Pairs of dimensions half the rotary part apart turn together; pair i of n by base^(-2 i / n).
    """
    turned_old, turned = int(old * share), int(new * share)
    half_old, half = turned_old // 2, turned // 2
    sources = []
    for i in range(turned):
        pair, part = i % half, i // half
        at = pair * half_old / half
        sources.append(int(at) + part * half_old if at.is_integer() else -1)
    rest = [turned_old + i if turned_old + i < old else -1 for i in range(new - turned)]
    return sources + rest
