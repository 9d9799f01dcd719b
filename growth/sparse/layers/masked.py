"""A dense weight with a mask of its own: SPDF's layer, and N:M sparsity."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from apical.kernels.sparse_low_rank.support import Kind

from .._dense import weight_of
from ._base import StructuredLinear, empty_like
from ._bits import pack, packed_size, unpack
from ._mask_support import MaskKind, largest, mask_support, without_noise
from ._semi_structured import semi_structured


class MaskedLinear(StructuredLinear):
    """W = weight where the mask is, 0 elsewhere; what is masked neither learns nor moves.

    Parameters: weight (n, m), bias (n,); buffer mask (ceil(n m / 8),) uint8, entry i of the
    flattened weight as bit i % 8 of byte i // 8. Masked entries of `weight` are exactly 0 and stay
    so under any optimizer of which 0 with a gradient of 0 is a fixed point (SGD, Adam, AdamW).
    Initial values are nn.Linear's.

    It computes as much as a dense layer: `flops` are those of the entries that are stored, for
    hardware that skips the others; see `to_semi_structured` for 2:4 on NVIDIA's.

    Args:
        in_features: m.
        out_features: n.
        bias: whether there is one.
        sparsity: masked share of the entries, 0 <= sparsity < 1; None for 1 - n / m with `nm`.
        support: what the mask is drawn from, see `Support`; `uniform` is SPDF's. With `explicit`
            nothing is masked until `set_mask` or a state dict brings a mask.
        seed: the mask is drawn from; a non-negative integer.
        block: size of a block of `grouped`, (n, m) of `nm`; None for their defaults.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an argument is out of its range.

    Source: Thangarasa et al. 2023 (SPDF, arXiv 2303.10464): a random mask, the same share in every
    layer, fixed while training; the mask dropped (`to_dense`) for dense fine-tuning.
    """

    mask: Tensor
    # a gradient is masked in the layer's own product
    readable = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float | None = None,
        support: MaskKind = "uniform",
        seed: int = 0,
        block: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.support = mask_support((out_features, in_features), support, sparsity, seed, block)
        self.sparsity = sparsity if self.support is None else without_noise(self.support.density)
        shape = (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty))
        size = packed_size(out_features * in_features)
        self.register_buffer("mask", torch.empty(size, dtype=torch.uint8, device=device))
        self.reset_parameters()

    def __getattr__(self, name: str) -> Any:
        # unlike the other layers, it has a dense weight: models may read it
        return nn.Module.__getattr__(self, name)

    @property
    def stored(self) -> int:
        """How many entries are not masked; on the meta device, as many as `sparsity` says."""
        if not self.mask.is_meta:
            return int(self.dense_mask().sum())
        entries = self.weight.numel()
        if self.support is not None:
            return self.support.stored
        return entries if self.sparsity is None else round((1 - self.sparsity) * entries)

    def dense_mask(self) -> Tensor:
        """Return the mask as (n, m) bool, True where an entry is stored."""
        return unpack(self.mask, self.weight.shape)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw initial values as nn.Linear does, and the mask from its seed."""
        if self.weight.is_meta:
            return
        fresh = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        for name, parameter in fresh.named_parameters():
            self.get_parameter(name).copy_(parameter)
        if self.support is None:
            self._store(torch.ones_like(self.weight, dtype=torch.bool))
        else:
            self._store(self.support.mask(self.weight.device))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return x W^T + bias; input (..., m), result (..., n)."""
        weight = _Masked.apply(self.weight, self.mask)
        assert isinstance(weight, Tensor)
        return functional.linear(input, weight, self.bias)

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Take another mask (n, m) bool: what it masks becomes 0, what it adds begins at 0.

        Call `mask_optimizer_state` behind it, or momentum moves what is masked.

        Raises:
            ValueError: it is of another shape or dtype, or masks everything.
        """
        self._check_mask(mask)
        self.support = self.sparsity = None
        self._store(mask.to(self.weight.device))

    @torch.no_grad()
    def mask_optimizer_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Set to 0 what an optimizer remembers of masked entries, and their gradients.

        Raises:
            ValueError: the optimizer does not have this layer's weight.
            NotImplementedError: its state is quantized.
        """
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(p is self.weight for p in held):
            raise ValueError("optimizer does not have this layer's weight; pass the one that does")
        state = optimizer.state.get(self.weight, {})
        found = [x for x in (*state.values(), self.weight.grad) if isinstance(x, Tensor)]
        found = [x for x in found if x.numel() > 1]
        if any(x.shape != self.weight.shape or not x.is_floating_point() for x in found):
            raise NotImplementedError(
                f"{type(optimizer).__name__} keeps state that is not one number an entry; use one "
                "that does, or make it anew after set_mask"
            )
        masked = ~self.dense_mask()
        for x in found:
            x.masked_fill_(_sharded_as(x, masked), 0)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Module,
        *,
        sparsity: float | None = None,
        support: Kind = "uniform",
        seed: int = 0,
        block: tuple[int, int] | None = None,
        mask: Tensor | None = None,
        init: Literal["magnitude", "random"] = "magnitude",
    ) -> MaskedLinear:
        """Return a layer in place of a dense one, of its shape, dtype, device and training mode.

        Args:
            linear: an nn.Linear or transformers' Conv1D. What is stored keeps its value.
            sparsity: see the layer.
            support: see the layer.
            seed: see the layer.
            block: see the layer.
            mask: (n, m) bool, True where an entry is stored; instead of all of these.
            init: `magnitude` stores the largest entries: of the layer with `uniform`, of each row
                with `regular`, n of every m with `nm`; the first ones where they are equal.
                `random` draws them from the seed, as SPDF does.

        Raises:
            ValueError: an argument is out of its range, a weight is not finite, or `grouped`
                support with `magnitude`.
        """
        if init not in ("magnitude", "random"):
            raise ValueError(f"init is {init!r}; expected 'magnitude' or 'random'")
        if mask is not None and sparsity is not None:
            raise ValueError(f"sparsity is {sparsity}; a mask has its own: pass None")
        weight = weight_of(linear)
        layer = cls(
            *(weight.shape[1], weight.shape[0], linear.bias is not None),
            sparsity=sparsity,
            support=support if mask is None else "explicit",
            seed=seed,
            block=block if mask is None else None,
            device="meta",
            dtype=weight.dtype,
        )
        empty_like(layer, linear)
        layer._take_from(linear)
        layer._take_weight(weight, mask, init)
        return layer

    def settings(self) -> dict[str, Any]:
        """Return the arguments that build this layer anew, as JSON holds them.

        A mask that no seed draws is not among them: it is the buffer `mask`.
        """
        found: dict[str, Any] = {"sparsity": self.sparsity, "support": "explicit"}
        if self.support is not None:
            found |= {"support": self.support.kind, "seed": self.support.seed}
            if self.support.kind in ("grouped", "nm"):
                found["block"] = list(self.support.block)
        return super().settings() | found

    def flops(self, tokens: int) -> int:
        """Return 2 T S, S the stored entries: what SPDF counts, and hardware has to skip for."""
        return 2 * tokens * self.stored

    def dense_weight(self) -> Tensor:
        """Return W (n, m): masked entries are 0, and free to learn in a dense layer."""
        if self.weight.is_meta:
            return torch.empty_like(self.weight)
        return torch.where(self.dense_mask(), self.weight, 0)

    def to_semi_structured(self) -> nn.Linear:
        """Return an nn.Linear for inference whose weight is torch's 2:4 semi-structured tensor.

        For masks with at most two stored of every four entries of a row, in half precision, on
        NVIDIA GPUs of capability 8.0 and above. Not measured.

        Raises:
            ValueError: the mask or the dtype is another.
            NotImplementedError: the device is another.
        """
        return semi_structured(self.to_dense(), self.dense_mask())

    @torch.no_grad()
    def _take_weight(self, weight: Tensor, mask: Tensor | None, init: str) -> None:
        if mask is not None:
            self._check_mask(mask)
        support = self.support
        if mask is None and init == "magnitude":
            if support is None or support.kind == "grouped":
                raise ValueError(
                    f"support is {'explicit' if support is None else support.kind!r} with "
                    "init='magnitude'; expected 'uniform', 'regular' or 'nm', or init='random'"
                )
            self.support = None
        if weight.is_meta:
            return
        if not weight.isfinite().all():
            raise ValueError("weight holds NaN or infinite entries; expected an initialised layer")
        self.weight.copy_(weight)
        if mask is None:
            assert support is not None
            mask = largest(weight, support) if init == "magnitude" else support.mask(weight.device)
        self._store(mask.to(weight.device))

    def _store(self, mask: Tensor) -> None:
        self.mask.copy_(pack(mask))
        self.weight.masked_fill_(_sharded_as(self.weight, ~mask), 0)

    def _check_mask(self, mask: Tensor) -> None:
        if mask.dtype != torch.bool or mask.shape != self.weight.shape:
            raise ValueError(
                f"mask is {tuple(mask.shape)} {mask.dtype}; expected "
                f"{tuple(self.weight.shape)} torch.bool, True where an entry is stored"
            )
        if not mask.is_meta and not mask.any():
            raise ValueError("mask stores no entry; expected at least one True")


def _sharded_as(x: Tensor, mask: Tensor) -> Tensor:
    """Return this rank's part of a mask that all ranks have, where x is sharded (FSDP)."""
    if not torch.distributed.is_available():
        return mask
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(x, DTensor):
        return mask
    return distribute_tensor(mask, x.device_mesh, x.placements, src_data_rank=None)


class _Masked(torch.autograd.Function):
    """The weight where its mask is, 0 elsewhere, also for NaN; backward keeps the bits alone."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        return torch.where(unpack(packed, weight.shape), weight, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (packed,), (grad,) = ctx.saved_tensors, grads
        return torch.where(unpack(packed, grad.shape), grad, 0), None
