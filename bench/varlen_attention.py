"""Packed attention against what torch offers for documents of different lengths."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from attention_peers import exact, peers
from packed import Forward, Packed, timed
from race import Call, Case, Lineup, Peer
from torch import Tensor

from apical import varlen_attention

# largest error of an output, relative to its norm: plain PyTorch's at that dtype, with room
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

# documents, typical length, spread of its logarithm, shortest, longest
_MIXES = {
    "few": (8, 30, 0.8, 8, 96),
    "mixed": (64, 220, 0.8, 32, 1024),
    "short": (256, 45, 0.8, 8, 256),
    "bert": (256, 128, 0.7, 16, 512),
    "web": (40, 500, 1.1, 32, 8192),
}
_UNIFORM = {"1k": (32, 1024), "4k": (8, 4096), "16k": (2, 16384)}


@dataclass(frozen=True)
class Shape:
    """What tells one case from another."""

    mix: str
    heads: int
    size: int  # of a head
    dtype: torch.dtype
    causal: bool
    train: bool  # forward and backward, or forward alone
    kv_heads: int | None = None
    option: str = ""  # of attention, raced against attention without it

    @property
    def name(self) -> str:
        dtype, mask = str(self.dtype).removeprefix("torch."), "causal" if self.causal else "full"
        heads = f"d{self.size}" + (f"-gqa{self.heads // self.kv_heads}" if self.kv_heads else "")
        name = f"{self.mix}-{dtype}-{heads}-{mask}-{'train' if self.train else 'forward'}"
        return name + (f"-{self.option}" if self.option else "")


def test_varlen_attention(case: Case, race: Callable[[Lineup], object]) -> None:
    race(case.build())


def cases(*, quick: bool, device: str) -> list[Case]:
    """Return the races."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        shapes = [Shape("few", 2, 32, fp32, True, True), Shape("few", 2, 32, bf16, False, False)]
        shapes += [Shape("few", 4, 32, fp32, True, True, kv_heads=2, option="window")]
    else:
        shapes = _gpu_shapes(bf16) if device == "cuda" else _cpu_shapes(fp32, bf16)
    return [Case(shape.name, functools.partial(_lineup, shape, device, quick)) for shape in shapes]


def _cpu_shapes(fp32: torch.dtype, bf16: torch.dtype) -> list[Shape]:
    both = (False, True)
    shapes = [Shape("mixed", 8, 64, fp32, causal, train) for causal in both for train in both]
    shapes += [Shape("short", 8, 64, fp32, causal, True) for causal in both]
    shapes += [Shape("mixed", 8, 64, bf16, causal, True) for causal in both]
    shapes += [Shape("short", 8, 64, bf16, causal, True) for causal in both]
    shapes += [Shape("mixed", 8, 64, fp32, True, True, option=option) for option in _OPTIONS]
    return shapes


def _gpu_shapes(bf16: torch.dtype) -> list[Shape]:
    shapes = [
        Shape(mix, 16, size, bf16, causal, train, kv_heads)
        for mix in ("mixed", "web", "bert", *_UNIFORM)
        for size, kv_heads in ((64, None), (128, None), (128, 4))
        for causal in (False, True)
        for train in (False, True)
    ]
    long = functools.partial(Shape, "4k", 16, 128, bf16, True)
    return shapes + [long(train, option=option) for train in (False, True) for option in _OPTIONS]


def _lengths(mix: str) -> list[int]:
    """Return the lengths of the documents, log-normal, the same on every machine."""
    if mix in _UNIFORM:
        count, length = _UNIFORM[mix]
        return [length] * count
    count, typical, spread, low, high = _MIXES[mix]
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return (noise * spread + math.log(typical)).exp().round().clamp(low, high).int().tolist()


def _inputs(shape: Shape, device: str) -> Packed:
    lengths, generator = _lengths(shape.mix), torch.Generator(device).manual_seed(0)
    kv_heads = shape.kv_heads or shape.heads
    q, grad, k, v = (
        torch.randn(sum(lengths), heads, shape.size, generator=generator, device=device).to(
            shape.dtype
        )
        for heads in (shape.heads, shape.heads, kv_heads, kv_heads)
    )
    return Packed((q, k, v), grad, lengths, shape.causal, shape.train)


def _lineup(shape: Shape, device: str, quick: bool) -> Lineup:
    x = _inputs(shape, device)
    T, H, D = x.grad.shape
    dtype = str(x.grad.dtype).removeprefix("torch.")
    what = (
        f"{len(x.lengths)} documents of {min(x.lengths)} to {max(x.lengths)} tokens, {T} in all; "
        f"{H} heads of {D}; {dtype}; {'causal' if x.causal else 'bidirectional'}; "
        f"{'forward and backward' if x.train else 'forward'}."
    )
    if shape.option:
        return _with_option(shape, x, what, dtype)
    return Lineup(
        ours=timed(_ours(x), x),
        peers=_own_reference(x) | peers(x, quick=quick),
        what=what,
        truth=timed(exact(x), x, dtype=torch.float64) if x.pairs * H < 2e8 else None,
        tolerance=_TOLERANCE[x.grad.dtype],
        # two matrix products forward, five backward
        flops=4 * x.pairs * H * D * (3.5 if x.train else 1),
        dtype=dtype,
    )


def _ours(x: Packed, impl: str = "fused", **options: Any) -> Forward:
    cu, longest = x.cu_seqlens, max(x.lengths)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(
            q, k, v, cu, max_seqlen_q=longest, causal=x.causal, impl=impl, **options
        )

    return forward


def _own_reference(x: Packed) -> dict[str, Call | Peer]:
    if x.grad.is_cuda:
        return {}
    return {"our reference": timed(_ours(x, "reference"), x)}


def _window(x: Packed) -> dict[str, Any]:
    return {"window_size": (127, 0 if x.causal else 127)}


def _alibi(x: Packed) -> dict[str, Any]:
    heads = x.grad.shape[1]
    slopes = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)])
    return {"alibi_slopes": slopes.to(x.grad.device)}


_OPTIONS: dict[str, Callable[[Packed], dict[str, Any]]] = {
    "window": _window,
    "alibi": _alibi,
    "softcap": lambda x: {"softcap": 50.0},
    "sinks": lambda x: {"sinks": torch.zeros(x.grad.shape[1], device=x.grad.device)},
    "dropout": lambda x: {
        "dropout_p": 0.1,
        "dropout_seed": torch.tensor([1], device=x.grad.device),
    },
}


def _with_option(shape: Shape, x: Packed, what: str, dtype: str) -> Lineup:
    """Return attention with an option against attention without it: what the option costs."""
    options = _OPTIONS[shape.option](x)
    # it computes something else, so it is a bound and nothing is compared
    plain = Peer(timed(_ours(x), x), limit=True)
    reference = (
        {}
        if x.grad.is_cuda
        else {"our reference": Peer(timed(_ours(x, "reference", **options), x), expected=10)}
    )
    return Lineup(
        ours=timed(_ours(x, **options), x),
        peers={"ours, without the option": plain} | reference,
        what=f"{what} With {shape.option}.",
        tolerance=_TOLERANCE[x.grad.dtype],
        dtype=dtype,
    )
