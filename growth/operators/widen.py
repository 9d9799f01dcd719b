"""Width: more directions in some or all spaces of a model, the function kept where it can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..plan import Fill, GrowthPlan, LayerSource
from ..spaces import architecture_of
from ._sizes import wider_sizes

if TYPE_CHECKING:
    # the command line shows its help without torch
    import torch

    from ..maps import LinearMap, SpaceMap

New = Literal["copy", "zero"]


@dataclass(frozen=True)
class Widen:
    """Net2Net and its kin: new directions are copies of old ones, or carry nothing at first.

    Copies share the weight with which they are read, so the sum is what it was. What lies before a
    norm is scaled so that the norm divides by what it did.

    Args:
        factor: multiplies hidden, every ffn, heads and kv_heads; what is given below wins. 2 if
            neither it nor a size is given.
        hidden, ffn, heads, kv_heads, head_dim: new sizes.
        moe_ffn, shared_ffn: likewise, of the experts of Qwen models and of their shared one.
        new: "copy" (Net2Net, FPI) or "zero" (new directions carry nothing and are read with random
            weights, so that they learn).
        split: how uneven copies are read: of two, the first with (1 + split) / 2 of the weight, so
            that their gradients differ; 0: evenly.
        noise: of normal numbers, relative to a weight's deviation, on what is read in copies.
        seed: of random weights.

    Raises:
        ValueError: a size that is smaller than the old one, or that the model cannot have.

    Source: Net2Net, arXiv 1511.05641; FPI of bert2BERT, arXiv 2110.07143; LEMON, arXiv 2310.07999.
    """

    factor: float | None = None
    hidden: int | None = None
    ffn: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    moe_ffn: int | None = None
    shared_ffn: int | None = None
    new: New = "copy"
    split: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan for a model with this config."""
        from ..widths import faults, rotary_share

        table = architecture_of(config)
        old = table.sizes(config)
        asked = {name: getattr(self, name) for name in _ASKED}
        sizes = wider_sizes(table, config, self.factor, asked)
        spaces = self._spaces(old, sizes, rotary_share(table, config))
        if table.key_of("kv_heads", config) is None:
            spaces.pop("kv_heads", None)
        notes = faults(table, config, spaces)
        if self.noise and self.new == "copy":
            notes.append("noise on what is read in copies")
        layers = tuple(LayerSource(((i, 1.0),)) for i in range(config[table.depth_key]))
        return GrowthPlan(
            "widen",
            asdict(self),
            config["model_type"],
            layers,
            spaces,
            fill=Fill(std=1.0, noise=self.noise, seed=self.seed),
            preserves_function=not notes,
            notes=tuple(notes),
        )

    def _spaces(
        self, old: Mapping[str, int], sizes: Mapping[str, int], share: float
    ) -> dict[str, SpaceMap]:
        from ..widths import rotary_sources

        found = {
            space: self._map(old[space], cycle(old[space], sizes[space], self.new))
            for space in ("hidden", "ffn", "moe_ffn", "shared_ffn")
            if space in sizes and sizes[space] != old[space]
        }
        if any(sizes[space] != old[space] for space in ("heads", "kv_heads")):
            heads, kv_heads = head_sources(old, sizes, self.new)
            found["heads"] = self._map(old["heads"], heads)
            if old["kv_heads"] != sizes["kv_heads"]:
                found["kv_heads"] = self._map(old["kv_heads"], kv_heads)
        if sizes["head_dim"] != old["head_dim"]:
            size, new = old["head_dim"], sizes["head_dim"]
            turned = rotary_sources(size, new, share) if share else cycle(size, new, "zero")
            found["qk_dim"] = self._map(size, turned)
            found["v_dim"] = self._map(size, cycle(size, new, self.new))
        return found

    def _map(self, old: int, sources: list[int]) -> SpaceMap:
        import torch

        from ..maps import LinearMap, SpaceMap

        carries = LinearMap.of(old, sources)
        counts = torch.bincount(carries.column, minlength=old).double()
        share = 1 / counts[carries.column]
        share += _unevenness(carries, counts) * self.split
        reads = LinearMap(carries.new, old, carries.row, carries.column, share)
        return SpaceMap(carries, reads)


_ASKED = ("hidden", "ffn", "heads", "kv_heads", "head_dim", "moe_ffn", "shared_ffn")


def cycle(old: int, new: int, how: New) -> list[int]:
    """Return where new directions come from: all old ones, then again, or nothing (-1)."""
    return [i % old if how == "copy" or i < old else -1 for i in range(new)]


def head_sources(
    old: Mapping[str, int], new: Mapping[str, int], how: New
) -> tuple[list[int], list[int]]:
    """Return where heads and key-value heads come from, so that queries meet their own keys."""
    group, new_group = (sizes["heads"] // sizes["kv_heads"] for sizes in (old, new))
    kv_heads, heads, seen = [], [], dict.fromkeys(range(old["kv_heads"]), 0)
    repeat = new["kv_heads"] % old["kv_heads"] == 0
    for k in range(new["kv_heads"]):
        times = new["kv_heads"] // old["kv_heads"]
        source = k // times if repeat else k % old["kv_heads"]
        copy = seen[source]
        seen[source] += 1
        kv_heads.append(source)
        for t in range(new_group):
            at = copy * new_group + t
            kept = how == "copy" or at < group
            heads.append(source * group + at % group if kept else -1)
    return heads, kv_heads


def _unevenness(carries: LinearMap, counts: torch.Tensor) -> torch.Tensor:
    """Return how far the copies of a direction are from an even share, summing to 0."""
    import torch

    order, found, seen = [], counts[carries.column], dict[int, int]()
    for column in carries.column.tolist():
        order.append(seen.get(column, 0))
        seen[column] = order[-1] + 1
    place = torch.tensor(order, dtype=torch.float64)
    return (found - 1 - 2 * place) / found / (found - 1).clamp(min=1)
