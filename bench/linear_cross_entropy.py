"""The loss against torch's own: with the logits whole, compiled, and in chunks."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from race import Call, Case, Lineup, Outputs, Peer
from torch import Tensor

from apical import linear_cross_entropy
from apical.kernels._common import native

# largest error of loss or gradient, relative to its norm: plain PyTorch's at that dtype, with room
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
# rows of logits at a time in the chunked peers: the fastest of 128 .. 1024 on a CPU with AVX-512
_CHUNK = 256

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    """The inputs of one case; input and linear_weight require grad."""

    input: Tensor  # (T, H)
    linear_weight: Tensor  # (V, H)
    target: Tensor  # (T,), -100 where ignored

    @property
    def valid(self) -> Tensor:
        return (self.target != -100).nonzero().squeeze(1)


def test_linear_cross_entropy(case: Case, race: Callable[[Lineup], object]) -> None:
    race(case.build())


def cases(*, quick: bool, device: str) -> list[Case]:
    """Return the races: tokens, width, vocabulary, dtype, share of tokens that have a label."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        table = [(96, 32, 1024, fp32, 1.0), (96, 32, 1024, bf16, 0.3)]
    elif device == "cuda":
        table = [(8192, 576, 49152, bf16, 1.0), (8192, 2048, 128256, bf16, 1.0)]
        table += [(8192, 4096, 128256, bf16, 1.0), (8192, 2048, 128256, bf16, 0.3)]
    else:
        table = [(2048, 256, 49152, fp32, 1.0), (2048, 576, 49152, fp32, 1.0)]
        table += [(2048, 256, 49152, bf16, 1.0), (2048, 256, 49152, fp32, 0.3)]
    return [_case(*row, device=device, quick=quick) for row in table]


def _case(
    T: int, H: int, V: int, dtype: torch.dtype, labelled: float, *, device: str, quick: bool
) -> Case:
    kind = str(dtype).removeprefix("torch.")
    name = f"{kind}-H{H}-V{V}" + ("" if labelled == 1 else f"-{labelled * 100:.0f}-percent-labels")

    def build() -> Lineup:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(T, H, generator=generator).to(device, dtype).requires_grad_()
        weight = torch.randn(V, H, generator=generator).mul_(H**-0.5).to(device, dtype)
        target = torch.randint(V, (T,), generator=generator)
        target[torch.rand(T, generator=generator) >= labelled] = -100
        return _lineup(Inputs(hidden, weight.requires_grad_(), target.to(device)), quick=quick)

    return Case(name, build)


def _lineup(x: Inputs, *, quick: bool) -> Lineup:
    (T, H), V, N = x.input.shape, len(x.linear_weight), len(x.valid)
    dtype = str(x.input.dtype).removeprefix("torch.")
    return Lineup(
        ours=_timed(_ours, x),
        peers=_torch(x, quick=quick) | _variants(x) | _packages(x),
        what=f"{T} tokens, {N} of them with a label; width {H}, vocabulary {V}; {dtype}; "
        "mean loss and both gradients.",
        truth=lambda: _exact(x),
        tolerance=_TOLERANCE[x.input.dtype],
        # three matrix products; tokens without a label need none
        flops=6 * N * H * V,
        dtype=dtype,
    )


def _timed(loss: Loss, x: Inputs) -> Call:
    """Return the call to time: the loss and both gradients."""

    def call() -> Outputs:
        value = loss(x.input, x.linear_weight, x.target)
        return (value.detach(), *torch.autograd.grad(value, (x.input, x.linear_weight)))

    return call


def _ours(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, target).loss


def _reference(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, target, impl="reference").loss


def _plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    # the logits are widened, as in transformers' losses
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def _exact(x: Inputs) -> Outputs:
    """Return loss and gradients in float64, a chunk of logits at a time."""
    W, valid = x.linear_weight.detach().double(), x.valid
    hidden = x.input.detach().double()
    loss, grad, grad_W = hidden.new_zeros(()), torch.zeros_like(hidden), torch.zeros_like(W)
    for rows in valid.split(_CHUNK):
        logits, target = hidden[rows] @ W.t(), x.target[rows]
        loss += F.cross_entropy(logits, target, reduction="sum") / len(valid)
        p = logits.softmax(1)
        p[torch.arange(len(rows), device=p.device), target] -= 1
        p /= len(valid)
        grad[rows] = p @ W
        grad_W.addmm_(p.t(), hidden[rows])
    return loss, grad, grad_W


def _torch(x: Inputs, *, quick: bool) -> dict[str, Call | Peer]:
    on_cpu = x.input.device.type == "cpu"
    compiled = Peer(_timed(_compiled(), x), compiled=True)
    if quick and on_cpu:
        compiled = Peer(reason="compiling takes longer than a quick run")
    return {
        "F.linear + F.cross_entropy": _timed(_plain, x),
        "the same, compiled": compiled,
        "F.linear_cross_entropy, default": _native(x, None),
        f"F.linear_cross_entropy, {_CHUNK} rows": _native(x, _CHUNK),
    }


def _compiled() -> Loss:
    @functools.cache
    def compiled() -> Loss:
        # a graph of another case must not count against the limit of recompilations
        torch.compiler.reset()
        return torch.compile(_plain, dynamic=False)

    return lambda hidden, weight, target: compiled()(hidden, weight, target)


def _native(x: Inputs, rows: int | None) -> Peer:
    if not hasattr(F, "linear_cross_entropy"):
        return Peer(reason=f"torch {torch.__version__} does not have it; 2.13 does")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return Peer(_timed(functools.partial(F.linear_cross_entropy, options=options), x))


def _variants(x: Inputs) -> dict[str, Call | Peer]:
    found: dict[str, Call | Peer] = {
        "our reference": _timed(_reference, x),
        "ours without the C++ pass": _without_extension(x),
        "three products, float32": Peer(_products(x, torch.float32), limit=True),
    }
    if x.input.dtype == torch.bfloat16:
        found["three products, bfloat16"] = Peer(_products(x, torch.bfloat16), limit=True)
    return found


def _without_extension(x: Inputs) -> Peer:
    if not native.loaded():
        return Peer(reason=f"ours is that already: the extension is {native.status()[1]}")
    call = _timed(_ours, x)

    def without() -> Outputs:
        with mock.patch.object(native, "loaded", return_value=False):
            return call()

    return Peer(without)


def _products(x: Inputs, dtype: torch.dtype) -> Call:
    """Return the three matrix products of the valid rows: what no exact loss can do without."""
    hidden, weight, valid = x.input.detach(), x.linear_weight.detach(), x.valid

    def call() -> Outputs:
        W, rows = weight.to(dtype), hidden[valid].to(dtype)
        grad, grad_W = torch.zeros_like(rows), torch.zeros_like(W)
        logits = rows.new_empty(min(_CHUNK, len(rows)), len(W))
        for chunk, out in zip(rows.split(_CHUNK), grad.split(_CHUNK), strict=True):
            part = torch.mm(chunk, W.t(), out=logits[: len(chunk)])
            torch.mm(part, W, out=out)
            grad_W.addmm_(part.t(), chunk)
        return grad, grad_W

    return call


def _packages(x: Inputs) -> dict[str, Call | Peer]:
    if x.input.device.type == "cpu":
        return {}
    return {
        "Liger (Triton)": _timed(_liger, x),
        "cut-cross-entropy": _timed(_cut, x),
    }


def _liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, target)


def _cut(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import (  # pyright: ignore[reportMissingImports]
        linear_cross_entropy as cut_cross_entropy,
    )

    return cut_cross_entropy(hidden, weight, target)
