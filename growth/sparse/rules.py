"""What `sparsify` replaces and by what: frozen dataclasses, one for each kind of layer."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ._dense import weight_of
from .layers import (
    BlockLinear,
    LowRankLinear,
    MaskedLinear,
    MonarchLinear,
    SparseLowRankLinear,
    StructuredLinear,
)

# explicit positions belong to one layer: no rule can hold them
Drawn = Literal["uniform", "regular", "grouped", "nm"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What all rules say: which layers are meant, and where random positions come from.

    Args:
        include: patterns of module names (shell-style, `*.mlp.*`), of which one has to match; None
            for every linear layer inside the model's repeated blocks. The output head is never
            meant.
        exclude: patterns of names that are left as they are.
        seed: each layer's own comes from this and its name.

    Raises:
        ValueError: an argument is out of its range.
    """

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):
                raise ValueError(f"{name} is the text {patterns!r}; expected a tuple of patterns")
            if patterns is not None:
                object.__setattr__(self, name, tuple(patterns))

    def convert(self, linear: nn.Module, seed: int) -> StructuredLinear:
        """Return the layer in place of a dense one; what is random is drawn from the seed."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SparseLowRank(Rule):
    """Low-rank plus sparse weights, see `SparseLowRankLinear`.

    Args:
        rank: an integer, or a share of min(n, m) as a float.
        density: stored share of the entries.
        alpha: the scale of the low-rank part is alpha / rank.
        support: which entries are stored; `uniform` is SLTrain's.
        block: of the supports `grouped` and `nm`; None for their defaults.
        recompute_hidden: less memory for activations, one product more in backward.
        init: `project` comes near the weights that are there, `sltrain` starts anew.
    """

    rank: int | float = 0.25
    density: float = 0.03
    alpha: float = 16.0
    support: Drawn = "uniform"
    block: tuple[int, int] | None = None
    recompute_hidden: bool = False
    init: Literal["project", "sltrain"] = "project"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block is not None:
            # a list, where it comes from a file
            height, width = self.block
            object.__setattr__(self, "block", (height, width))

    def convert(self, linear: nn.Module, seed: int) -> StructuredLinear:
        return SparseLowRankLinear.from_dense(
            linear,
            rank=rank_of(self.rank, linear),
            density=self.density,
            alpha=self.alpha,
            support=self.support,
            seed=seed,
            block=self.block,
            recompute_hidden=self.recompute_hidden,
            init=self.init,
        )


@dataclass(frozen=True, kw_only=True)
class LowRank(Rule):
    """Low-rank weights, see `LowRankLinear`.

    Args:
        rank: an integer, a share of min(n, m) as a float, or None for a third of the parameters.
        activation: `silu` for CoLA's layer.
        init: `svd` comes near the weights that are there, `cola` starts anew.
    """

    rank: int | float | None = None
    activation: Literal["silu"] | None = None
    init: Literal["svd", "cola"] = "svd"

    def convert(self, linear: nn.Module, seed: int) -> StructuredLinear:
        rank = None if self.rank is None else rank_of(self.rank, linear)
        return LowRankLinear.from_dense(
            linear, rank=rank, activation=self.activation, init=self.init
        )


@dataclass(frozen=True, kw_only=True)
class Masked(Rule):
    """Dense weights with a fixed mask, see `MaskedLinear`.

    Args:
        sparsity: masked share of the entries; None for 1 - n / m with `nm`.
        support: `uniform`, `regular`, `grouped` or `nm`.
        block: of `grouped` and `nm`; None for their defaults.
        init: `magnitude` keeps the largest weights that are there; `random` draws the mask, as SPDF
            does to train from scratch.
    """

    sparsity: float | None = None
    support: Drawn = "uniform"
    block: tuple[int, int] | None = None
    init: Literal["magnitude", "random"] = "magnitude"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block is not None:
            # a list, where it comes from a file
            height, width = self.block
            object.__setattr__(self, "block", (height, width))

    def convert(self, linear: nn.Module, seed: int) -> StructuredLinear:
        return MaskedLinear.from_dense(
            linear,
            sparsity=self.sparsity,
            support=self.support,
            seed=seed,
            block=self.block,
            init=self.init,
        )


@dataclass(frozen=True, kw_only=True)
class Monarch(Rule):
    """Monarch matrices, see `MonarchLinear`.

    Args:
        blocks: runs of inputs and combs of outputs; divides both sizes of every layer meant.
        rank: of each of the blocks^2 parts; None for min(n, m) / blocks^2.
        init: `project` comes near the weights that are there, `random` starts anew.
    """

    blocks: int = 4
    rank: int | None = None
    init: Literal["project", "random"] = "project"

    def convert(self, linear: nn.Module, seed: int) -> StructuredLinear:
        return MonarchLinear.from_dense(linear, blocks=self.blocks, rank=self.rank, init=self.init)


@dataclass(frozen=True, kw_only=True)
class Block(Rule):
    """Block-diagonal matrices, see `BlockLinear`.

    Args:
        blocks: divides both sizes of every layer meant.
        init: `project` comes near the weights that are there, `random` starts anew.
    """

    blocks: int = 4
    init: Literal["project", "random"] = "project"

    def convert(self, linear: nn.Module, seed: int) -> StructuredLinear:
        return BlockLinear.from_dense(linear, blocks=self.blocks, init=self.init)


def rank_of(rank: float, linear: nn.Module) -> int:
    """Return the rank that is meant for a layer: an integer itself, a float's share of min(n, m).

    Raises:
        ValueError: a share is not above 0 and at most 1.
    """
    if not isinstance(rank, float):
        return rank
    if not 0 < rank <= 1:
        raise ValueError(
            f"rank is {rank}; expected a share above 0 and at most 1, or an integer for the rank"
        )
    return max(round(rank * min(weight_of(linear).shape)), 1)
