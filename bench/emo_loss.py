"""EMO's loss in chunks against the released formulation, which keeps every matrix whole."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from race import Call, Case, Lineup, Outputs, Peer
from torch import Tensor

from apical.kernels.emo_loss import emo_loss

# largest error of loss or gradient, relative to its norm: plain PyTorch's at that dtype, with room
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
# rows at a time of what is computed in chunks here
_CHUNK = 256

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    """The inputs of one case; input and linear_weight require grad."""

    input: Tensor  # (T, H)
    linear_weight: Tensor  # (V, H)
    target: Tensor  # (T,), -100 where ignored
    cost_weight: Tensor  # (V, H)

    @property
    def valid(self) -> Tensor:
        return (self.target != -100).nonzero().squeeze(1)


def test_emo_loss(case: Case, race: Callable[[Lineup], object]) -> None:
    race(case.build())


def cases(*, quick: bool, device: str) -> list[Case]:
    """Return the races: tokens, width, vocabulary, dtype, share of tokens that have a label."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        table = [(96, 32, 1024, fp32, 1.0), (96, 32, 1024, bf16, 0.3)]
    elif device == "cuda":
        table = [(8192, 2048, 128256, bf16, 1.0)]
    else:
        table = [(2048, 256, 49152, fp32, 1.0), (2048, 256, 49152, fp32, 0.3)]
    return [_case(*row, device=device) for row in table]


def _case(T: int, H: int, V: int, dtype: torch.dtype, labelled: float, *, device: str) -> Case:
    kind = str(dtype).removeprefix("torch.")
    name = f"{kind}-H{H}-V{V}" + ("" if labelled == 1 else f"-{labelled * 100:.0f}-percent-labels")

    def build() -> Lineup:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(T, H, generator=generator).to(device, dtype).requires_grad_()
        weight = torch.randn(V, H, generator=generator).mul_(H**-0.5).to(device, dtype)
        target = torch.randint(V, (T,), generator=generator)
        target[torch.rand(T, generator=generator) >= labelled] = -100
        before = weight + 0.1 * torch.randn_like(weight)
        return _lineup(Inputs(hidden, weight.requires_grad_(), target.to(device), before))

    return Case(name, build)


def _lineup(x: Inputs) -> Lineup:
    (T, H), V, N = x.input.shape, len(x.linear_weight), len(x.valid)
    dtype = str(x.input.dtype).removeprefix("torch.")
    return Lineup(
        ours=_timed(_ours, x),
        peers={
            "released formulation": _timed(_released, x),
            "the same, of labelled rows": _timed(_labelled, x),
            "four products, float32": Peer(_products(x), limit=True),
        },
        what=f"{T} tokens, {N} of them with a label; width {H}, vocabulary {V}; {dtype}; "
        "mode 1, mean loss and both gradients.",
        truth=lambda: _exact(x),
        tolerance=_TOLERANCE[x.input.dtype],
        # four matrix products; tokens without a label need none
        flops=8 * N * H * V,
        dtype=dtype,
    )


def _timed(loss: Loss, x: Inputs) -> Call:
    """Return the call to time: the loss and both gradients."""

    def call() -> Outputs:
        value = loss(x.input, x.linear_weight, x.target, x.cost_weight)
        return (value.detach(), *torch.autograd.grad(value, (x.input, x.linear_weight)))

    return call


def _ours(hidden: Tensor, weight: Tensor, target: Tensor, cost: Tensor) -> Tensor:
    return emo_loss(hidden, weight, target, cost).loss


def _released(hidden: Tensor, weight: Tensor, target: Tensor, cost: Tensor) -> Tensor:
    """The formulation of the released package, in float32, without its dense one-hot matrix."""
    logits, E = F.linear(hidden, weight).float(), F.normalize(cost.float(), dim=1)
    nll = F.cross_entropy(logits, target, reduction="none")
    expected = logits.softmax(1) @ E  # (T, H)
    valid = target != -100
    distance = (1 - (E[target.clamp(min=0)] * expected).sum(1)) * valid
    ratio = (nll / (distance + 1e-10)).detach().clamp(max=3)
    return ((ratio * distance + nll) / 2).sum() / valid.sum()


def _labelled(hidden: Tensor, weight: Tensor, target: Tensor, cost: Tensor) -> Tensor:
    rows = (target != -100).nonzero().squeeze(1)
    return _released(hidden[rows], weight, target[rows], cost)


def _exact(x: Inputs) -> Outputs:
    """Return loss and gradients in float64, a chunk of logits at a time."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (x.input, x.linear_weight))
    total, count = hidden.new_zeros(()), len(x.valid)
    for rows in x.valid.split(_CHUNK):
        logits, y = hidden[rows] @ weight.t(), x.target[rows]
        E = F.normalize(x.cost_weight.double(), dim=1)
        nll = F.cross_entropy(logits, y, reduction="none")
        distance = 1 - (E[y] * (logits.softmax(1) @ E)).sum(1)
        ratio = (nll / (distance + 1e-10)).detach().clamp(max=3)
        part = ((ratio * distance + nll) / 2).sum() / count
        part.backward()
        total += part.detach()
    assert hidden.grad is not None
    assert weight.grad is not None
    return total, hidden.grad, weight.grad


def _products(x: Inputs) -> Call:
    """Return the four matrix products of the valid rows, logits and costs a chunk at a time."""
    hidden, weight, valid = x.input.detach(), x.linear_weight.detach(), x.valid

    def call() -> Outputs:
        W, E, rows = weight.float(), x.cost_weight.float(), hidden[valid].float()
        grad, grad_W = torch.zeros_like(rows), torch.zeros_like(W)
        buffers = rows.new_empty(2, min(_CHUNK, len(rows)), len(W))
        for chunk, out in zip(rows.split(_CHUNK), grad.split(_CHUNK), strict=True):
            part = torch.mm(chunk, W.t(), out=buffers[0, : len(chunk)])
            torch.mm(chunk, E.t(), out=buffers[1, : len(chunk)])
            torch.mm(part, W, out=out)
            grad_W.addmm_(part.t(), chunk)
        return grad, grad_W

    return call
