"""A weight that is a low-rank matrix plus a sparse one: SLTrain's layer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from apical.kernels.sparse_low_rank import Support, sparse_low_rank
from apical.kernels.sparse_low_rank.support import Kind

from .._dense import weight_of
from .._projection import beside_sparse
from ._base import StructuredLinear, check_rank, empty_like


class SparseLowRankLinear(StructuredLinear):
    """W = alpha / rank * B A + S, with S stored at fixed positions and all three trained.

    Parameters: a (R, m), b (n, R), values (S,), bias (n,). Initial values are SLTrain's: A as
    nn.Linear's weight, B = 0, values uniform in +-1/sqrt(m), bias in +-1/sqrt(n).

    The positions are a function of `support`, `seed`, `density` and the shape, and not in a state
    dict; explicit ones are, as the buffer `positions`.

    Precision: float32 and bfloat16 by the fused kernels (see `apical.sparse_low_rank`), float64 by
    the reference.

    Args:
        in_features: m.
        out_features: n.
        bias: whether there is one.
        rank: R, at most min(n, m).
        density: stored share of the n * m entries; None with explicit positions.
        alpha: numerator of the scale of B A.
        support: `uniform` (SLTrain's), `regular`, `grouped` (the fast one on a GPU), `nm` or
            `explicit`; see `Support`.
        seed: what the positions are drawn from; a non-negative integer.
        block: size of a block of `grouped`, (n, m) of `nm`; None for their defaults.
        positions: (S,) flat positions of an explicit support, distinct.
        recompute_hidden: compute x A^T again in backward instead of keeping it.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an argument is out of its range.

    Source: Han et al. 2024 (SLTrain, arXiv 2406.02214).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        density: float | None = None,
        alpha: float,
        support: Kind = "uniform",
        seed: int = 0,
        block: tuple[int, int] | None = None,
        positions: Tensor | None = None,
        recompute_hidden: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        check_rank(rank, in_features, out_features)
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha is {alpha}; expected a positive number")
        self.rank, self.alpha, self.recompute_hidden = rank, alpha, recompute_hidden
        shape = (out_features, in_features)
        self.support = _support(shape, support, density, seed, block, positions)
        self.a = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.values = nn.Parameter(torch.empty(self.support.stored, device=device, dtype=dtype))
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))
        self.register_buffer("positions", _saved(self.support, self.a.device))
        self.register_load_state_dict_post_hook(_follow_positions)
        self.reset_parameters()

    positions: Tensor | None

    @property
    def scale(self) -> float:
        """Of B A: alpha / rank."""
        return self.alpha / self.rank

    def reset_parameters(self) -> None:
        """Draw initial values as SLTrain does, from torch's global generator."""
        if self.bias is not None:
            bound = 1 / math.sqrt(self.out_features)
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.values, -bound, bound)
        self._fill_positions()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return x W^T + bias; input (..., m), result (..., n)."""
        return sparse_low_rank(
            input,
            self.a,
            self.b,
            self.values,
            self.support,
            bias=self.bias,
            scale=self.scale,
            recompute_hidden=self.recompute_hidden,
            # the definition is what gradients are checked against, and the one in double precision
            impl="reference" if self.a.dtype == torch.float64 else "fused",
        )

    @classmethod
    def from_dense(
        cls,
        linear: nn.Module,
        *,
        rank: int,
        density: float | None = None,
        alpha: float,
        support: Kind = "uniform",
        seed: int = 0,
        block: tuple[int, int] | None = None,
        positions: Tensor | None = None,
        recompute_hidden: bool = False,
        init: Literal["project", "sltrain"] = "project",
    ) -> SparseLowRankLinear:
        """Return a layer in place of a dense one, of its shape, dtype, device and training mode.

        Args:
            linear: an nn.Linear or transformers' Conv1D.
            rank: as of the layer, like all that follow but the last.
            density: see the layer.
            alpha: see the layer.
            support: see the layer.
            seed: see the layer.
            block: see the layer.
            positions: see the layer.
            recompute_hidden: see the layer.
            init: `project` comes near the weight by alternating projection (exact at full rank,
                not the optimum otherwise) and keeps the bias; `sltrain` draws all values anew.

        Raises:
            ValueError: an argument is out of its range, or a weight to `project` is not finite.
        """
        if init not in ("project", "sltrain"):
            raise ValueError(f"init is {init!r}; expected 'project' or 'sltrain'")
        weight = weight_of(linear)
        layer = cls(
            *(weight.shape[1], weight.shape[0], linear.bias is not None),
            rank=rank,
            density=density,
            alpha=alpha,
            support=support,
            seed=seed,
            block=block,
            positions=positions,
            recompute_hidden=recompute_hidden,
            device="meta",
            dtype=weight.dtype,
        )
        empty_like(layer, linear)
        layer._take_from(linear)
        if init == "sltrain":
            layer.reset_parameters()
        elif not weight.is_meta:
            layer._project(weight)
        return layer

    def settings(self) -> dict[str, Any]:
        """Return the arguments that build this layer anew, as JSON holds them.

        Explicit positions are not among them: they are the buffer `positions`.
        """
        support = self.support
        found = {"rank": self.rank, "alpha": self.alpha, "support": support.kind}
        if support.kind != "explicit":
            found |= {"density": support.density, "seed": support.seed}
        if support.kind in ("grouped", "nm"):
            found["block"] = list(support.block)
        return super().settings() | found | {"recompute_hidden": self.recompute_hidden}

    def flops(self, tokens: int) -> int:
        """Return 2 T (R (n + m) + S), the operations of a forward pass; dense has 2 T n m."""
        per_token = self.rank * (self.in_features + self.out_features) + self.support.stored
        return 2 * tokens * per_token

    def dense_weight(self) -> Tensor:
        """Return scale B A + S (n, m), summed in at least float32 and rounded once."""
        wide = torch.promote_types(self.a.dtype, torch.float32)
        weight = self.scale * (self.b.to(wide) @ self.a.to(wide))
        if not weight.is_meta:
            flat = self.support.flat(weight.device)
            weight = weight.view(-1).index_add(0, flat, self.values.to(wide)).view_as(weight)
        return weight.to(self.a.dtype)

    def _traced_weight(self) -> Tensor:
        # a graph cannot draw positions, but hold the kernel's index
        eye = torch.eye(self.in_features, dtype=self.a.dtype, device=self.a.device)
        return sparse_low_rank(eye, self.a, self.b, self.values, self.support, scale=self.scale).T

    @torch.no_grad()
    def _project(self, weight: Tensor) -> None:
        flat = self.support.flat(weight.device)
        left, right = beside_sparse(weight, flat, self.rank)
        root = math.sqrt(self.scale)
        self.b.copy_(left / root)
        self.a.copy_(right / root)
        # from the rounded factors: what they lose at stored positions is stored
        low_rank = self.scale * (self.b.to(left.dtype) @ self.a.to(left.dtype))
        self.values.copy_(weight.reshape(-1)[flat] - low_rank.view(-1)[flat])
        self._fill_positions()

    def _fill_positions(self) -> None:
        if self.positions is not None:
            saved = self.support.positions
            assert saved is not None
            self.positions.copy_(saved)

    def __getstate__(self) -> dict[str, Any]:
        # a copy draws its index when it needs it: none is copied or pickled
        return self.__dict__ | {"support": replace(self.support)}


def _support(
    shape: tuple[int, int],
    kind: Kind,
    density: float | None,
    seed: int,
    block: tuple[int, int] | None,
    positions: Tensor | None,
) -> Support:
    if (positions is not None) != (kind == "explicit"):
        raise ValueError(
            f"support is {kind!r} with {'no ' if positions is None else ''}positions; "
            "support='explicit' and positions come together"
        )
    if positions is not None:
        if density is not None:
            raise ValueError(f"density is {density}; explicit positions have their own: pass None")
        return Support.explicit(positions, *shape)
    if density is None:
        raise ValueError("density is missing; expected the share of entries to store, such as 0.03")
    rows, columns = block or (0, 0)  # the support's default
    return Support(kind, *shape, density, seed, block=(rows, columns))


def _follow_positions(layer: nn.Module, _: object) -> None:
    """Make the support that of positions which a state dict brought."""
    assert isinstance(layer, SparseLowRankLinear)
    if layer.positions is None or layer.positions.is_meta:
        return
    loaded = layer.positions.detach().cpu().long()
    if (loaded[1:] <= loaded[:-1]).any():
        raise ValueError(
            "positions in the state dict are not ascending; sort them and their values"
        )
    if not torch.equal(loaded, layer.support.flat()):
        layer.support = Support.explicit(loaded, layer.out_features, layer.in_features)


def _saved(support: Support, device: torch.device) -> Tensor | None:
    if support.positions is None:
        return None
    small = support.out_features * support.in_features <= torch.iinfo(torch.int32).max
    return support.positions.to(device, torch.int32 if small else torch.int64)
