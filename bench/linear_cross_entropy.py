"""The loss against torch's own: with the logits whole, compiled, and in chunks."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
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


@dataclass(frozen=True)
class Shape:
    """One race: sizes, the share of tokens that have a label, and an option of the loss."""

    T: int
    H: int
    V: int
    dtype: torch.dtype
    labelled: float = 1.0
    option: str = ""

    @property
    def kind(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        parts = [f"{self.kind}-H{self.H}-V{self.V}"]
        if self.labelled < 1:
            parts.append(f"{self.labelled * 100:.0f}-percent-labels")
        return "-".join(parts + [self.option.replace(" ", "-")] * bool(self.option))


def cases(*, quick: bool, device: str) -> list[Case]:
    """Return the races of this device."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        table = [Shape(96, 32, 1024, fp32), Shape(96, 32, 1024, bf16, 0.3)]
        table += [Shape(96, 32, 1024, fp32, option=option) for option in _OPTIONS]
    elif device == "cuda":
        sizes = ((576, 49152), (2048, 128256), (2304, 256000), (4096, 128256))
        table = [Shape(8192, H, V, bf16) for H, V in sizes]
        table += [Shape(8192, 2048, 128256, bf16, 0.3)]
        table += [Shape(8192, 2048, 128256, bf16, option=option) for option in _OPTIONS]
    else:
        table = [Shape(2048, H, 49152, dtype) for dtype in (fp32, bf16) for H in (256, 576)]
        table += [Shape(2048, 256, 49152, fp32, 0.3)]
        table += [Shape(2048, 256, 49152, fp32, option=option) for option in _OPTIONS]
    return [_case(shape, device=device, quick=quick) for shape in table]


def _case(shape: Shape, *, device: str, quick: bool) -> Case:
    def build() -> Lineup:
        x = _inputs(shape, device)
        return _with_option(shape, x) if shape.option else _lineup(x, quick=quick)

    return Case(shape.name, build)


def _inputs(shape: Shape, device: str) -> Inputs:
    T, H, V = shape.T, shape.H, shape.V
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator).to(device, shape.dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).mul_(H**-0.5).to(device, shape.dtype)
    target = torch.randint(V, (T,), generator=generator)
    target[torch.rand(T, generator=generator) >= shape.labelled] = -100
    return Inputs(hidden, weight.requires_grad_(), target.to(device))


def _soft_labels(x: Inputs) -> dict[str, Any]:
    (T, _), V, K = x.input.shape, len(x.linear_weight), 16
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(T, V // 64, generator=generator).argsort(1)[:, :K] * 64
    weights = torch.rand(T, K, generator=generator).softmax(1) * 0.5
    return {"soft_ids": ids.to(x.input.device), "soft_weights": weights.to(x.input.device)}


# what the loss is asked for beside the mean over the labels
_OPTIONS: dict[str, Callable[[Inputs], dict[str, Any]]] = {
    "soft cap and z-loss": lambda x: {"softcap": 30.0, "z_loss": 1e-4},
    "label smoothing": lambda x: {"label_smoothing": 0.1},
    "bias": lambda x: {"linear_bias": x.linear_weight.detach()[:, 0].contiguous()},
    "16 soft labels": _soft_labels,
    "a loss per token": lambda x: {"reduction": "none"},
}


def _with_option(shape: Shape, x: Inputs) -> Lineup:
    """Return the loss with an option against the loss without it: what the option costs."""
    options = _OPTIONS[shape.option](x)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, impl: str = "fused") -> Tensor:
        return linear_cross_entropy(hidden, weight, target, impl=impl, **options).loss.mean()

    return Lineup(
        ours=_timed(loss, x),
        # it computes something else, so it is a bound and nothing is compared
        peers={
            "ours, without the option": Peer(_timed(_ours, x), limit=True),
            "our reference": _timed(functools.partial(loss, impl="reference"), x),
        },
        what=f"{_described(x)} With {shape.option}.",
        tolerance=_TOLERANCE[shape.dtype],
        dtype=shape.kind,
    )


def _described(x: Inputs) -> str:
    (T, H), V, N = x.input.shape, len(x.linear_weight), len(x.valid)
    dtype = str(x.input.dtype).removeprefix("torch.")
    return (
        f"{T} tokens, {N} of them with a label; width {H}, vocabulary {V}; {dtype}; "
        "loss and both gradients."
    )


def _lineup(x: Inputs, *, quick: bool) -> Lineup:
    H, V, N = x.input.shape[1], len(x.linear_weight), len(x.valid)
    dtype = str(x.input.dtype).removeprefix("torch.")
    return Lineup(
        ours=_timed(_ours, x),
        peers=_torch(x, quick=quick) | _variants(x) | _packages(x),
        what=_described(x),
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
