"""A weight with blocks on its diagonal alone."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._dense import weight_of
from ._base import StructuredLinear, empty_like
from ._blocks import check_blocks


class BlockLinear(StructuredLinear):
    """W block-diagonal: each of `blocks` parts of the outputs sees one part of the inputs.

    Parameters: diagonal (blocks, n / blocks, m / blocks), bias (n,). Initial values are those of an
    nn.Linear for each block. Parts never mix: put a layer that mixes behind it.

    Args:
        in_features: m.
        out_features: n.
        bias: whether there is one.
        blocks: divides both; parameters and operations are 1 / blocks of dense ones.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an argument is out of its range.

    Source: ours; block-diagonal layers are the factors of Dao et al. 2022 (arXiv 2204.00595).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocks: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        check_blocks(blocks, in_features, out_features)
        self.blocks = blocks
        shape = (blocks, out_features // blocks, in_features // blocks)
        self.diagonal = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial values within 1 / sqrt(m / blocks), from torch's global generator."""
        bound = 1 / math.sqrt(self.diagonal.shape[2])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return x W^T + bias; input (..., m), result (..., n)."""
        parts = input.unflatten(-1, (self.blocks, -1))  # (..., blocks, m / blocks)
        output = torch.einsum("...bs,bps->...bp", parts, self.diagonal).flatten(-2)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Module,
        *,
        blocks: int = 4,
        init: Literal["project", "random"] = "project",
    ) -> BlockLinear:
        """Return a layer in place of a dense one, of its shape, dtype, device and training mode.

        Args:
            linear: an nn.Linear or transformers' Conv1D.
            blocks: see the layer.
            init: `project` takes the blocks on the diagonal, the nearest such matrix, and the bias;
                `random` draws all values anew.

        Raises:
            ValueError: an argument is out of its range, or a weight to `project` is not finite.
        """
        if init not in ("project", "random"):
            raise ValueError(f"init is {init!r}; expected 'project' or 'random'")
        weight = weight_of(linear)
        layer = cls(
            *(weight.shape[1], weight.shape[0], linear.bias is not None),
            blocks=blocks,
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
        return super().settings() | {"blocks": self.blocks}

    def flops(self, tokens: int) -> int:
        """Return 2 T n m / blocks, the operations of a forward pass; dense has 2 T n m."""
        return 2 * tokens * self.diagonal.numel()

    def dense_weight(self) -> Tensor:
        """Return W (n, m), zeros off the diagonal."""
        # block_diag has no kernel for tensors without data
        if self.diagonal.is_meta:
            return self.diagonal.new_empty(self.out_features, self.in_features)
        return torch.block_diag(*self.diagonal)

    @torch.no_grad()
    def _project(self, weight: Tensor) -> None:
        if not weight.isfinite().all():
            raise ValueError("weight holds NaN or infinite entries; expected an initialised layer")
        parts = weight.unflatten(1, (self.blocks, -1)).unflatten(0, (self.blocks, -1))
        for i in range(self.blocks):
            self.diagonal[i].copy_(parts[i, :, i])
