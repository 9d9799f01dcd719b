"""A weight that is a Monarch matrix: two block-diagonal factors and a permutation between them."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from apical.kernels.monarch import monarch_matmul
from apical.kernels.monarch._reference import weight as product_of

from .._dense import weight_of
from ._base import StructuredLinear, empty_like
from ._blocks import check_blocks


def monarch_rank(in_features: int, out_features: int, blocks: int) -> int:
    """Return min(n, m) / blocks^2 rounded down, at least 1: a rank of published Monarch layers.

    A square layer then has 2 / blocks of the dense parameters and operations. Rank 1, the matrices
    of the theory, is that of blocks = sqrt(n).

    Source: Dao et al. 2022 (Monarch, arXiv 2204.00595), the block sizes of its code.
    """
    return max(min(in_features, out_features) // blocks**2, 1)


class MonarchLinear(StructuredLinear):
    """W of blocks x blocks parts of rank j each, over runs of inputs and combs of outputs.

    Parameters: first (r, j k, s), second (k, p, r j) with r = k = blocks, m = r s, n = p k, see
    `apical.monarch_matmul`; bias (n,). Initial values as in the authors' code: uniform within
    1 / sqrt(fan-in) for each factor (s of the first, r j of the second) and 1 / sqrt(n) for bias.

    Precision: float32, bfloat16 and float16 by the fused kernels, float64 by the reference.

    Args:
        in_features: m.
        out_features: n, also other than m.
        bias: whether there is one.
        blocks: runs of inputs, and combs of outputs; divides both.
        rank: j, at most min(n, m) / blocks; None for `monarch_rank`'s.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an argument is out of its range.

    Source: Dao et al. 2022 (Monarch, arXiv 2204.00595), which has square ones of full blocks;
    rectangular ones and any rank are ours.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocks: int = 4,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        check_blocks(blocks, in_features, out_features)
        rank = monarch_rank(in_features, out_features, blocks) if rank is None else rank
        run, comb = in_features // blocks, out_features // blocks
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= min(run, comb):
            raise ValueError(
                f"rank is {rank!r}; expected an integer in 1 .. {min(run, comb)}, the smaller side "
                f"of a part of {comb} x {run}"
            )
        self.blocks, self.rank = blocks, rank
        first, second = (blocks, rank * blocks, run), (blocks, comb, blocks * rank)
        self.first = nn.Parameter(torch.empty(first, device=device, dtype=dtype))
        self.second = nn.Parameter(torch.empty(second, device=device, dtype=dtype))
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial values as the authors' code does, from torch's global generator."""
        for factor in (self.first, self.second):
            bound = 1 / math.sqrt(factor.shape[2])
            nn.init.uniform_(factor, -bound, bound)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.out_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return x W^T + bias; input (..., m), result (..., n)."""
        # the definition is what gradients are checked against, and the one in double precision
        impl = "reference" if self.first.dtype == torch.float64 else "fused"
        return monarch_matmul(input, self.first, self.second, bias=self.bias, impl=impl)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Module,
        *,
        blocks: int = 4,
        rank: int | None = None,
        init: Literal["project", "random"] = "project",
    ) -> MonarchLinear:
        """Return a layer in place of a dense one, of its shape, dtype, device and training mode.

        Args:
            linear: an nn.Linear or transformers' Conv1D.
            blocks: see the layer.
            rank: see the layer.
            init: `project` is the nearest such matrix in the Frobenius norm, by the singular
                values of each part, and keeps the bias; `random` draws all values anew.

        Raises:
            ValueError: an argument is out of its range, or a weight to `project` is not finite.
        """
        if init not in ("project", "random"):
            raise ValueError(f"init is {init!r}; expected 'project' or 'random'")
        weight = weight_of(linear)
        layer = cls(
            *(weight.shape[1], weight.shape[0], linear.bias is not None),
            blocks=blocks,
            rank=rank,
            device="meta",
            dtype=weight.dtype,
        )
        empty_like(layer, linear)
        layer._take_from(linear)
        if init == "random":
            layer.reset_parameters()
        elif not weight.is_meta:
            layer._project(weight.detach())
        return layer

    def settings(self) -> dict[str, Any]:
        """Return the arguments that build this layer anew, as JSON holds them."""
        return super().settings() | {"blocks": self.blocks, "rank": self.rank}

    def flops(self, tokens: int) -> int:
        """Return 2 T j blocks (n + m), the operations of a forward pass; dense has 2 T n m."""
        return 2 * tokens * self.rank * self.blocks * (self.in_features + self.out_features)

    def dense_weight(self) -> Tensor:
        """Return W (n, m), summed in at least float32 and rounded once: to go on with densely.

        Training a Monarch layer first and the dense one of `to_dense` after it is the paper's
        reverse sparsification.
        """
        wide = torch.promote_types(self.first.dtype, torch.float32)
        return product_of(self.first.to(wide), self.second.to(wide)).to(self.first.dtype)

    @torch.no_grad()
    def _project(self, weight: Tensor) -> None:
        if not weight.isfinite().all():
            raise ValueError("weight holds NaN or infinite entries; expected an initialised layer")
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        parts = wide.unflatten(1, (self.blocks, -1)).unflatten(0, (-1, self.blocks))
        # (k, r, p, s); comb K has the outputs K, blocks + K, ...
        left, values, right = torch.linalg.svd(parts.permute(1, 2, 0, 3), full_matrices=False)
        root = values[..., : self.rank].sqrt()
        left = left[..., : self.rank] * root[..., None, :]  # (k, r, p, j)
        right = right[..., : self.rank, :] * root[..., None]  # (k, r, j, s)
        self.second.copy_(left.transpose(1, 2).flatten(2))
        self.first.copy_(right.permute(1, 2, 0, 3).flatten(1, 2))
