"""Packed documents as a bench's inputs, and the call that is timed on them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from race import Call, Outputs
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Packed:
    """The inputs of one case."""

    tensors: tuple[Tensor, Tensor, Tensor]  # query (T, H, D), key and value (T, K, D)
    grad: Tensor  # (T, H, D)
    lengths: list[int]
    causal: bool
    train: bool

    @property
    def grouped(self) -> bool:
        return self.tensors[0].shape[1] != self.tensors[1].shape[1]

    @property
    def pairs(self) -> int:
        return sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        return ends.to(self.grad.device, torch.int32)

    @property
    def documents(self) -> Tensor:  # (T,)
        lengths = torch.tensor(self.lengths, device=self.grad.device)
        return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


def timed(forward: Forward, x: Packed, *, dtype: torch.dtype | None = None) -> Call:
    """Return the call to time: the forward, or the forward and every gradient."""
    leaves = [t.to(dtype).detach().requires_grad_(x.train) for t in x.tensors]

    def call() -> Outputs:
        output = forward(*leaves)
        if not x.train:
            return (output,)
        grads = torch.autograd.grad(output, leaves, x.grad.to(output.dtype))
        return (output.detach(), *grads)

    return call
