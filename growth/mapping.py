"""Makes the tensors of a grown model, one at a time: sums of layers, axes by the maps of spaces."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .maps import LinearMap, joined
from .plan import Fill, GrowthPlan, TensorSource
from .spaces import Weight, architecture_of
from .spaces.axes import Axis, parse
from .widths import complete

Read = Callable[[str], Tensor]


class Mapper:
    """What a plan makes of the tensors of a model with a config.

    Args:
        plan: what to do.
        config: of the model before it grows, with its defaults filled in.
        gradient: map gradients, and moments of them, instead of weights: a copy that is read with
            half the weight gets half the gradient.
        power: 2 for second moments.
    """

    def __init__(
        self, plan: GrowthPlan, config: Mapping[str, Any], *, gradient: bool = False, power: int = 1
    ) -> None:
        self.plan = plan
        self.table = architecture_of(config)
        self._maps = complete(self.table, config, plan.spaces)
        self._sizes = self.table.sizes(config)
        self._names = self.table.weights(config)
        self._shares_values = self.table.key_of("kv_heads", config) is not None
        self._gradient, self._power = gradient, power
        self._std = config.get("initializer_range", config.get("init_std", 0.02))
        # one map per kind of axis, as long as the plan is applied
        self._axis_maps: dict[str, LinearMap | None] = {}
        self._gain_maps: dict[tuple[str, str], LinearMap | None] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the grown model."""
        sizes = self._sizes | {space: found.new for space, found in self._maps.items()}
        return self.table.weight(name).shape(sizes)

    def copies(self, name: str) -> str | None:
        """Return the old tensor that this one is, bit for bit, if it is one."""
        source = self.plan.sources(name)
        if source.is_new or len(source.terms) != 1 or source.terms[0][1] != 1:
            return None
        axes = (axis for axis in (*self.table.weight(name).axes, self.table.weight(name).norm))
        changes = any(
            space in self._maps for axis in axes if axis for space in parse(axis).spaces()
        )
        return None if changes else source.terms[0][0]

    def tensor(self, name: str, read: Read) -> Tensor:
        """Return one tensor of the grown model, in storage of its own.

        Precision: a copy is bit for bit; products and sums are made in at least float32.

        Args:
            name: of the tensor, as a whole model calls it.
            read: gives an old tensor by its name.
        """
        weight, source = self.table.weight(name), self.plan.sources(name)
        if not source.terms:
            like = read(next(n for n in self._names if self.table.split(n)[0] == 0))
            if self._gradient:
                return torch.zeros(self.shape(name), dtype=like.dtype, device=like.device)
            size = parse(weight.axes[0]).size(self._sizes)
            gain = torch.full((size,), 1.0 - self.table.gain_offset)
            return self._gain(gain.to(like.device, like.dtype), weight)
        if source.zero:
            like = read(source.terms[0][0])
            silent = -self.table.gain_offset if weight.norm and not self._gradient else 0.0
            return torch.full(self.shape(name), silent, dtype=like.dtype, device=like.device)
        if source.random:
            return self._untrained(name, weight, read(source.terms[0][0]))
        grown = self._grown(source, weight, read)
        ahead = self._ahead(name, weight)
        if ahead:
            grown = torch.where(
                ahead[1].to(grown.device), self._grown(ahead[0], weight, read), grown
            )
        return self._filled(grown, name, weight).contiguous()

    def _untrained(self, name: str, weight: Weight, like: Tensor) -> Tensor:
        # as transformers initialises: matrices are normal, biases 0, gains 1
        if self._gradient or len(weight.axes) == 1:
            value = 1 - self.table.gain_offset if weight.norm and not self._gradient else 0.0
            return torch.full(self.shape(name), value, dtype=like.dtype, device=like.device)
        seed = self.plan.fill.seed if self.plan.fill else 0
        drawn = _normal(self.shape(name), seed, name) * self._std
        return drawn.to(like.device, like.dtype)

    def _grown(self, source: TensorSource, weight: Weight, read: Read) -> Tensor:
        if weight.norm:
            return self._gain(summed(source, read, power=self._power), weight)
        maps = [(i, m) for i, text in enumerate(weight.axes) if (m := self._axis_map(text))]
        # a map writes to storage of its own
        changes = any(not found.is_identity for _, found in maps)
        total = summed(source, read, power=self._power, own=not changes)
        for axis, found in maps:
            total = found.apply(total, axis)
        return total

    def _gain(self, gain: Tensor, weight: Weight) -> Tensor:
        found = self._gain_map(weight)
        if found is None:
            return gain
        wide = gain.to(torch.promote_types(gain.dtype, torch.float32))
        offset = 0.0 if self._gradient else self.table.gain_offset
        effective = wide + offset
        grown = found.apply(effective, 0)
        new = torch.ones(found.new, dtype=torch.bool)
        new[found.row] = False
        if not self._gradient:
            # what is normalised is 0 there; a gain of 0 would keep it from ever learning
            grown[new] = effective.mean()
        return (grown - offset).to(gain.dtype)

    def _gain_map(self, weight: Weight) -> LinearMap | None:
        key = (weight.axes[0], weight.norm)
        if key not in self._gain_maps:
            self._gain_maps[key] = self._made_gain_map(weight)
        return self._gain_maps[key]

    def _made_gain_map(self, weight: Weight) -> LinearMap | None:
        out, of = (self._sides(axis) for axis in (weight.axes[0], weight.norm))
        if out is None and of is None:
            return None
        identity = LinearMap.identity(parse(weight.axes[0]).size(self._sizes))
        out_carries, out_reads = out or (identity, identity)
        of_carries = of[0] if of else identity
        if not out_carries.selects:
            return self._mixed_gain(out_reads if self._gradient else out_carries, weight.norm)
        at = of_carries.at(out_carries.row, out_carries.column)
        ratio = out_carries.weight / at
        if self._gradient:
            ratio = out_reads.at(out_carries.row, out_carries.column) * at
        parts = (out_carries.row, out_carries.column, ratio**self._power)
        return LinearMap(out_carries.new, out_carries.old, *parts)

    def _mixed_gain(self, out: LinearMap, norm: str) -> LinearMap:
        # a gain that mixes old ones has no ratio: it is what its axis carries, without amplitudes
        amplitude = parse(norm).fold(self._amplitude, torch.kron, torch.cat)[out.column]
        weight = out.weight * amplitude if self._gradient else out.weight / amplitude
        return LinearMap(out.new, out.old, out.row, out.column, weight).power(self._power)

    def _amplitude(self, factor: str | int) -> Tensor:
        found = self._maps.get(factor) if isinstance(factor, str) else None
        if found is not None and found.amplitude is not None:
            return found.amplitude
        size = found.old if found else factor if isinstance(factor, int) else self._sizes[factor]
        return torch.ones(size, dtype=torch.float64)

    def _axis_map(self, text: str) -> LinearMap | None:
        if text not in self._axis_maps:
            sides, reads = self._sides(text), parse(text).reads != self._gradient
            self._axis_maps[text] = sides and sides[1 if reads else 0].power(self._power)
        return self._axis_maps[text]

    def _sides(self, text: str) -> tuple[LinearMap, LinearMap] | None:
        # what an axis carries, and how it is read; None: it does not change
        axis = parse(text)
        if not any(space in self._maps for space in axis.spaces()):
            return None
        return self._side(axis, "carries"), self._side(axis, "reads")

    def _side(self, axis: Axis, side: str) -> LinearMap:
        def leaf(factor: str | int) -> LinearMap:
            if isinstance(factor, str) and factor in self._maps:
                return getattr(self._maps[factor], side)
            return LinearMap.identity(factor if isinstance(factor, int) else self._sizes[factor])

        return axis.fold(leaf, LinearMap.times, joined)

    def _ahead(self, name: str, weight: Weight) -> tuple[TensorSource, Tensor] | None:
        layer = self.table.split(name)[0]
        if layer is None or not any(m.ahead is not None for m in self._maps.values()):
            return None
        mask = torch.zeros(self.shape(name), dtype=torch.bool)
        for i, axis in enumerate(map(parse, weight.axes)):
            if not axis.reads:
                shape = [-1 if i == j else 1 for j in range(mask.ndim)]
                mask |= axis.fold(self._mask, _either, torch.cat).view(shape)
        return self.plan.sources_ahead(name), mask

    def _mask(self, factor: str | int) -> Tensor:
        found = self._maps.get(factor) if isinstance(factor, str) else None
        if found is not None and found.ahead is not None:
            return found.ahead
        size = factor if isinstance(factor, int) else found.new if found else self._sizes[factor]
        return torch.zeros(size, dtype=torch.bool)

    def _filled(self, grown: Tensor, name: str, weight: Weight) -> Tensor:
        fill = self.plan.fill
        if fill is None or weight.norm or self._gradient:
            return grown
        for i, text in enumerate(weight.axes):
            if self._axis_map(text) is not None:
                grown = _with_noise(grown, i, self._deviation(text, fill), fill.seed, name)
        return grown

    def _deviation(self, text: str, fill: Fill) -> Tensor:
        # of random numbers along an axis, (new,), relative to the weight's own
        axis = parse(text)
        std = torch.where(axis.fold(self._unread(axis), _either, torch.cat), fill.std, 0.0)
        if axis.reads and fill.noise:
            reads = self._side(axis, "reads")
            often = torch.bincount(reads.column, minlength=reads.old)[reads.column] > 1
            std[reads.row] += torch.where(often, fill.noise, 0.0)
        return std.double()

    def _unread(self, axis: Axis) -> Callable[[str | int], Tensor]:
        # which new directions carry nothing, so that any weight may read them; a new head carries
        # the values of an old one, if it shares them: nothing may read it, and its queries are free
        def leaf(factor: str | int) -> Tensor:
            found = self._maps.get(factor) if isinstance(factor, str) else None
            size = (
                factor if isinstance(factor, int) else found.new if found else self._sizes[factor]
            )
            fresh = torch.zeros(size, dtype=torch.bool)
            shares = factor == "heads" and self._shares_values
            # a norm over all heads would see other weights
            if found is not None and axis.reads != shares and factor != "heads_raw":
                fresh[:] = True
                fresh[found.carries.row] = False
            return fresh

        return leaf


def summed(source: TensorSource, read: Read, *, power: int = 1, own: bool = True) -> Tensor:
    """Return the sum of a tensor's terms; a plain copy is bit for bit, in storage of its own."""
    (name, weight), *others = source.terms
    first = read(name).detach()
    if not others and isinstance(weight, float) and weight == 1:
        return first.clone(memory_format=torch.contiguous_format) if own else first
    total = first.to(torch.promote_types(first.dtype, torch.float32)) * weight**power
    for name, weight in others:
        total += read(name).detach() * weight**power
    return total.to(first.dtype)


def _either(slow: Tensor, fast: Tensor) -> Tensor:
    return (slow[:, None] | fast).flatten()


def _with_noise(grown: Tensor, axis: int, std: Tensor, seed: int, name: str) -> Tensor:
    """Return the tensor plus normal numbers whose deviation depends on the place on an axis."""
    if not bool(std.any()):
        return grown
    wide = grown.to(torch.promote_types(grown.dtype, torch.float32))
    drawn = _normal(grown.shape, seed, f"{name} {axis}")
    shape = [-1 if i == axis else 1 for i in range(grown.ndim)]
    # new directions that are still zero say nothing about the weight's deviation
    old = wide[wide != 0]
    deviation = old.std(correction=0) if len(old) else old.new_zeros(())
    size = deviation * std.view(shape).to(grown.device, wide.dtype)
    return (wide + drawn.to(grown.device, wide.dtype) * size).to(grown.dtype)


def _normal(shape: Sequence[int], seed: int, name: str) -> Tensor:
    # generators on the CPU look at 32 bits of a seed
    mixed = zlib.crc32(f"{seed} {name}".encode())
    generator = torch.Generator().manual_seed(mixed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
