"""A weight that is a product of two thin matrices, with an activation between them or none."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._dense import weight_of
from .._projection import low_rank
from ._base import StructuredLinear, check_rank, empty_like

# PELA's c: a layer with that rank has 1 / c of the parameters
_SHRINK = 3


def pela_rank(in_features: int, out_features: int) -> int:
    """Return floor(n m / (3 (n + m))), the rank that leaves a third of the parameters, at least 1.

    Source: Guo et al. 2023 (PELA, arXiv 2310.10700), with its c = 3.
    """
    return max(in_features * out_features // (_SHRINK * (in_features + out_features)), 1)


class LowRankLinear(StructuredLinear):
    """y = B f(A x) + bias, with f the identity or an activation.

    Parameters: a (R, m), b (n, R), bias (n,). Initial values are CoLA's: entries of A and B normal
    with variance 1 / sqrt(R (n + m)), so those of B A have 1 / (n + m); bias in +-1/sqrt(n).

    Args:
        in_features: m.
        out_features: n.
        bias: whether there is one.
        rank: R, at most min(n, m); None for PELA's, see `pela_rank`.
        activation: None, or `silu` for CoLA's layer.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an argument is out of its range.

    Source: Guo et al. 2023 (PELA, arXiv 2310.10700) for `from_dense` and the rank, Liu et al. 2025
    (CoLA, arXiv 2502.10940) for the activation and the initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int | None = None,
        activation: Literal["silu"] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        if activation not in (None, "silu"):
            raise ValueError(f"activation is {activation!r}; expected None or 'silu'")
        self.rank = pela_rank(in_features, out_features) if rank is None else rank
        check_rank(self.rank, in_features, out_features)
        self.activation = activation
        self.readable = activation is None
        self.a = nn.Parameter(torch.empty(self.rank, in_features, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(out_features, self.rank, device=device, dtype=dtype))
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial values as CoLA does, from torch's global generator."""
        deviation = (self.rank * (self.in_features + self.out_features)) ** -0.25
        nn.init.normal_(self.a, std=deviation)
        nn.init.normal_(self.b, std=deviation)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.out_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return B f(A x) + bias; input (..., m), result (..., n)."""
        hidden = functional.linear(input, self.a)  # (..., R)
        if self.activation == "silu":
            hidden = functional.silu(hidden)
        return functional.linear(hidden, self.b, self.bias)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Module,
        *,
        rank: int | None = None,
        activation: Literal["silu"] | None = None,
        init: Literal["svd", "cola"] = "svd",
    ) -> LowRankLinear:
        """Return a layer in place of a dense one, of its shape, dtype, device and training mode.

        Args:
            linear: an nn.Linear or transformers' Conv1D.
            rank: see the layer.
            activation: see the layer; needs `cola`.
            init: `svd` is the nearest matrix of that rank, U sqrt(S) and sqrt(S) V^T, and keeps the
                bias; `cola` draws all values anew.

        Raises:
            ValueError: an argument is out of its range; with `svd`, a weight that is not finite.
        """
        if init not in ("svd", "cola"):
            raise ValueError(f"init is {init!r}; expected 'svd' or 'cola'")
        if activation is not None and init == "svd":
            raise ValueError(
                f"activation is {activation!r} with init='svd', but B f(A x) is near no given "
                "matrix; pass init='cola' to train it from the start"
            )
        weight = weight_of(linear)
        layer = cls(
            *(weight.shape[1], weight.shape[0], linear.bias is not None),
            rank=rank,
            activation=activation,
            device="meta",
            dtype=weight.dtype,
        )
        empty_like(layer, linear)
        layer._take_from(linear)
        if init == "cola":
            layer.reset_parameters()
        elif not weight.is_meta:
            left, right = low_rank(weight, layer.rank)
            layer.b.data.copy_(left)
            layer.a.data.copy_(right)
        return layer

    def settings(self) -> dict[str, Any]:
        """Return the arguments that build this layer anew, as JSON holds them."""
        return super().settings() | {"rank": self.rank, "activation": self.activation}

    def flops(self, tokens: int) -> int:
        """Return 2 T R (n + m), the operations of a forward pass; dense has 2 T n m."""
        return 2 * tokens * self.rank * (self.in_features + self.out_features)

    def dense_weight(self) -> Tensor:
        """Return B A (n, m), summed in at least float32 and rounded once.

        Raises:
            ValueError: the layer has an activation.
        """
        if self.activation is not None:
            raise ValueError(
                f"this LowRankLinear has activation={self.activation!r} between its factors, so it "
                "is no matrix and has no dense weight; keep the layer as it is"
            )
        wide = torch.promote_types(self.a.dtype, torch.float32)
        return (self.b.to(wide) @ self.a.to(wide)).to(self.a.dtype)

    def _traced_weight(self) -> Tensor:
        if self.activation is None:
            return self.dense_weight()
        # models that ask for the type alone can be compiled; what else they ask has no answer
        return self.a.new_full((self.out_features, self.in_features), math.nan)
