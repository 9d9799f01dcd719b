"""Sparse plus low-rank layers against dense ones, SLTrain's way, and torch's sparse matrices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from race import Call, Case, Lineup, Outputs, Peer
from sparse_peers import Csr, Materialised, WithCsr
from torch import Tensor

from apical.kernels.sparse_low_rank import Support, sparse_low_rank

# largest error of an output, relative to its norm: plain PyTorch's at that dtype, with room
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_DENSITY, _SCALE = 0.03, 0.25

Layer = Callable[..., Tensor]


@dataclass(frozen=True)
class Size:
    """One layer, and the tokens of a call."""

    tokens: int
    inputs: int
    outputs: int
    rank: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The case's part of a name."""
        dtype = "" if self.dtype == torch.float32 else "-bfloat16"
        return f"{self.inputs}x{self.outputs}{dtype}"


@dataclass(frozen=True)
class Inputs:
    """The inputs of one case; all but grad require grad."""

    input: Tensor  # (T, m)
    a: Tensor  # (R, m)
    b: Tensor  # (n, R)
    values: Tensor  # (S,)
    dense: Tensor  # (n, m)
    grad: Tensor  # (T, n)
    support: Support


def test_sparse_low_rank(case: Case, race: Callable[[Lineup], object]) -> None:
    race(case.build())


def cases(*, quick: bool, device: str) -> list[Case]:
    """Return the races: forward and backward of a layer; products with the sparse part alone."""
    found = []
    for size in _sizes(quick=quick, device=device):
        for kind in ("uniform", "regular", "grouped"):
            found.append(_case(f"layer-{kind}", size, kind, device, _layers))
        if size.dtype == torch.float32:
            for kind in ("uniform", "grouped"):
                found.append(_case(f"product-{kind}", size, kind, device, _products))
                found.append(_case(f"sampled-{kind}", size, kind, device, _sampled))
    return found


def _sizes(*, quick: bool, device: str) -> list[Size]:
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        return [Size(96, 512, 256, 32, fp32), Size(96, 512, 256, 32, bf16)]
    if device == "cuda":
        return [Size(16384, 4096, 4096, 1024, bf16), Size(16384, 4096, 11008, 1024, bf16)]
    shapes = [(1024, 1024, 256), (2048, 2048, 512), (1024, 2816, 256)]
    return [Size(2048, *shape, fp32) for shape in shapes] + [Size(2048, 2048, 2048, 512, bf16)]


def _case(
    what: str, size: Size, kind: str, device: str, lineup: Callable[[Inputs, str], Lineup]
) -> Case:
    def build() -> Lineup:
        x = _inputs(size, kind, device)
        text = (
            f"{size.tokens} tokens, {size.inputs} to {size.outputs}, rank {size.rank}, "
            f"{x.values.numel()} entries, {kind}"
        )
        return lineup(x, text)

    return Case(f"{what}-{size.name}", build)


def _inputs(size: Size, kind: str, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    support = Support(cast(Any, kind), size.outputs, size.inputs, _DENSITY)
    support.index(device)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=generator) * std
        return drawn.to(device, size.dtype).requires_grad_()

    std = size.inputs**-0.5
    return Inputs(
        normal(size.tokens, size.inputs),
        normal(size.rank, size.inputs, std=std),
        normal(size.outputs, size.rank, std=std),
        normal(support.stored, std=std),
        normal(size.outputs, size.inputs, std=std),
        normal(size.tokens, size.outputs).detach(),
        support,
    )


def _layers(x: Inputs, text: str) -> Lineup:
    flat, csr = x.support.flat(x.input.device), Csr.of(x.support, x.input.device)
    order = flat.argsort()

    def ours(input: Tensor, a: Tensor, b: Tensor, values: Tensor) -> Tensor:  # noqa: A002
        return sparse_low_rank(input, a, b, values, x.support, scale=_SCALE)

    def sltrain(*operands: Tensor) -> Tensor:
        return cast(Tensor, Materialised.apply(*operands, flat, _SCALE))

    def matrices(*operands: Tensor) -> Tensor:
        return cast(Tensor, WithCsr.apply(*operands, order, csr, _SCALE))

    def low_rank(input: Tensor, a: Tensor, b: Tensor) -> Tensor:  # noqa: A002
        return F.linear(F.linear(input, a * _SCALE), b)

    operands = (x.input, x.a, x.b, x.values)
    peers: dict[str, Call | Peer] = {
        "nn.Linear, dense": Peer(_timed(F.linear, (x.input, x.dense), x.grad), limit=True),
        "SLTrain's way": _timed(sltrain, operands, x.grad),
        "torch CSR + sampled_addmm": Peer(_timed(matrices, operands, x.grad), expected=2),
        "low rank alone": Peer(_timed(low_rank, operands[:3], x.grad), limit=True),
    }
    if x.input.dtype != torch.float32:
        peers["torch CSR + sampled_addmm"] = Peer(reason="sampled_addmm has no bfloat16")
    return Lineup(
        ours=_timed(ours, operands, x.grad),
        peers=peers,
        what=f"Layer, forward and backward: {text}.",
        truth=lambda: _exact(x, flat),
        tolerance=_TOLERANCE[x.input.dtype],
        flops=6 * len(x.input) * (x.a.numel() + x.b.numel() + x.values.numel()),
        dtype=str(x.input.dtype).removeprefix("torch."),
    )


def _timed(layer: Layer, operands: tuple[Tensor, ...], grad: Tensor) -> Call:
    """Return the call to time: the output and the gradients of the operands."""

    def call() -> Outputs:
        y = layer(*operands)
        return (y.detach(), *torch.autograd.grad(y, operands, grad))

    return call


def _products(x: Inputs, text: str) -> Lineup:
    input, values = x.input.detach(), x.values.detach()  # noqa: A001
    matrix = Csr.of(x.support, input.device).matrix(values[x.support.flat().argsort()])
    op = _sparse_op(x.support, input.device)
    return Lineup(
        ours=lambda: (op.add(torch.zeros_like(x.grad), input, values),),
        peers={
            "torch CSR": lambda: ((matrix @ input.t()).t(),),
            "dense product": Peer(lambda: (input @ x.dense.detach().t(),), limit=True),
        },
        what=f"Product with the sparse matrix alone: {text}.",
        flops=2 * len(input) * values.numel(),
    )


def _sampled(x: Inputs, text: str) -> Lineup:
    input = x.input.detach()  # noqa: A001
    csr, order = Csr.of(x.support, input.device), x.support.flat().argsort()
    zero = csr.matrix(torch.zeros(len(order)))
    op, place = _sparse_op(x.support, input.device), torch.empty_like(order)
    place[order] = torch.arange(len(order))

    def theirs() -> Outputs:
        found = torch.sparse.sampled_addmm(zero, x.grad.t(), input, beta=0.0)
        return (found.values()[place],)

    return Lineup(
        ours=lambda: (op.sampled(x.grad, input),),
        peers={
            "torch sampled_addmm": theirs,
            "dense product": Peer(lambda: (x.grad.t() @ input,), limit=True),
        },
        what=f"Gradient of the stored entries alone: {text}.",
        flops=2 * len(input) * len(order),
    )


@dataclass(frozen=True)
class _SparseOp:
    """The raw ops on one support."""

    add: Callable[[Tensor, Tensor, Tensor], Tensor]
    sampled: Callable[[Tensor, Tensor], Tensor]


def _sparse_op(support: Support, device: torch.device) -> _SparseOp:
    index, ops = support.index(device), torch.ops.apical
    grouped = support.kind == "grouped"
    where = (index[0], index[1], *(support.block if grouped else ()))

    def add(out: Tensor, input: Tensor, values: Tensor) -> Tensor:  # noqa: A002
        (ops.blocks_add_ if grouped else ops.sparse_add_)(out, input, values, *where)
        return out

    return _SparseOp(add, lambda grad, input: (  # noqa: A006
        ops.blocks_sampled if grouped else ops.sparse_sampled)(grad, input, *where))  # fmt: skip


def _exact(x: Inputs, flat: Tensor) -> Outputs:
    """Return output and gradients in float64."""
    operands = [t.detach().double() for t in (x.input, x.a, x.b, x.values)]
    operands = [t.requires_grad_() for t in operands]
    input, a, b, values = operands  # noqa: A001
    sparse = torch.zeros(x.dense.numel(), dtype=torch.float64, device=flat.device)
    weight = _SCALE * b @ a + sparse.scatter(0, flat, values).view(x.dense.shape)
    y = F.linear(input, weight)
    return (y.detach(), *torch.autograd.grad(y, operands, x.grad.double()))
