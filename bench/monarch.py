"""Monarch layers against dense ones, against the same by einsum, and as their code writes them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from race import Call, Case, Lineup, Outputs, Peer
from torch import Tensor

from apical.kernels.monarch import monarch_matmul

# largest error of an output, relative to its norm: plain PyTorch's at that dtype, with room
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Layer = Callable[..., Tensor]


@dataclass(frozen=True)
class Size:
    """One layer, and the tokens of a call."""

    tokens: int
    inputs: int
    outputs: int
    blocks: int
    rank: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The case's part of a name."""
        dtype = "" if self.dtype == torch.float32 else "-bfloat16"
        return f"{self.inputs}x{self.outputs}-{self.blocks}{dtype}"


@dataclass(frozen=True)
class Inputs:
    """The inputs of one case; all but grad require grad."""

    input: Tensor  # (T, m)
    first: Tensor  # (r, j k, s)
    second: Tensor  # (k, p, r j)
    dense: Tensor  # (n, m)
    grad: Tensor  # (T, n)


def test_monarch(case: Case, race: Callable[[Lineup], object]) -> None:
    race(case.build())


def cases(*, quick: bool, device: str) -> list[Case]:
    """Return the races: forward alone, and forward and backward, of a layer."""
    passes = {"forward": _forward, "training": _training}
    return [
        _case(what, size, timed, device)
        for size in _sizes(quick=quick, device=device)
        for what, timed in passes.items()
    ]


def _sizes(*, quick: bool, device: str) -> list[Size]:
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        return [Size(96, 128, 256, 4, 8, fp32), Size(96, 128, 256, 4, 8, bf16)]
    # rank min(n, m) / blocks^2: 2 / blocks of a square layer's operations
    if device == "cuda":
        return [Size(16384, 4096, 4096, 4, 256, bf16), Size(16384, 4096, 4096, 64, 1, bf16)]
    shapes = [(1024, 1024, 4, 64), (2048, 2048, 4, 128), (1024, 2816, 4, 64), (2048, 2048, 16, 8)]
    return [Size(2048, *shape, fp32) for shape in shapes] + [Size(2048, 2048, 2048, 4, 128, bf16)]


def _case(what: str, size: Size, timed: Callable[..., Call], device: str) -> Case:
    def build() -> Lineup:
        return _lineup(_inputs(size, device), size, what, timed)

    return Case(f"{what}-{size.name}", build)


def _inputs(size: Size, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    blocks, rank, run, comb = size.blocks, size.rank, size.inputs, size.outputs

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator) * (shape[-1] ** -0.5)
        return drawn.to(device, size.dtype).requires_grad_()

    return Inputs(
        normal(size.tokens, run),
        normal(blocks, rank * blocks, run // blocks),
        normal(blocks, comb // blocks, blocks * rank),
        normal(comb, run),
        normal(size.tokens, comb).detach(),
    )


def _lineup(x: Inputs, size: Size, what: str, timed: Callable[..., Call]) -> Lineup:
    operands = (x.input, x.first, x.second)
    return Lineup(
        ours=timed(monarch_matmul, operands, x.grad),
        peers={
            "nn.Linear, dense": Peer(timed(F.linear, (x.input, x.dense), x.grad), limit=True),
            "as in fly's code": timed(_as_published, operands, x.grad),
            "einsum": timed(_einsum, operands, x.grad),
        },
        what=f"{what}: {size.tokens} tokens, {size.inputs} to {size.outputs}, {size.blocks} blocks"
        f" of rank {size.rank}.",
        truth=lambda: timed(_einsum, _exact(operands), x.grad.double())(),
        tolerance=_TOLERANCE[size.dtype],
        flops=(2 if what == "forward" else 6) * size.tokens * (x.first.numel() + x.second.numel()),
        dtype=str(size.dtype).removeprefix("torch."),
    )


def _forward(layer: Layer, operands: tuple[Tensor, ...], grad: Tensor) -> Call:
    del grad

    def call() -> Outputs:
        with torch.no_grad():
            return (layer(*operands),)

    return call


def _training(layer: Layer, operands: tuple[Tensor, ...], grad: Tensor) -> Call:
    def call() -> Outputs:
        y = layer(*operands)
        return (y.detach(), *torch.autograd.grad(y, operands, grad))

    return call


def _exact(operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().double().requires_grad_() for t in operands)


def _as_published(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the product as Dao et al.'s code computes it: both regroupings are copies."""
    (runs, rows, size), (combs, outputs, _) = first.shape, second.shape
    hidden = torch.bmm(x.view(-1, runs, size).transpose(0, 1), first.transpose(1, 2))
    hidden = hidden.transpose(0, 1).reshape(len(x), runs * rows // combs, combs)
    hidden = hidden.permute(2, 0, 1).contiguous()
    made = torch.bmm(hidden, second.transpose(1, 2))  # (k, T, p)
    return made.permute(1, 2, 0).reshape(len(x), outputs * combs)


def _einsum(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    (runs, rows, size), combs = first.shape, len(second)
    right = first.view(runs, rows // combs, combs, size)
    left = second.view(combs, -1, runs, rows // combs)
    hidden = torch.einsum("trs,rjks->trjk", x.view(-1, runs, size), right)
    return torch.einsum("trjk,kprj->tpk", hidden, left).flatten(1)
