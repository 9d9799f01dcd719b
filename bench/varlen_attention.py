"""Packed attention against what torch offers for documents of different lengths."""

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from packed import Forward, Packed, timed
from race import Call, Case, Lineup, Outputs, Peer
from torch import Tensor

from apical import varlen_attention

# largest error of an output, relative to its norm: plain PyTorch's at that dtype, with room
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

# documents, typical length, shortest, longest
_MIXES = {"few": (8, 30, 8, 96), "mixed": (64, 220, 32, 1024), "short": (256, 45, 8, 256)}


@dataclass(frozen=True)
class Shape:
    """What tells one case from another."""

    mix: str
    heads: int
    size: int  # of a head
    dtype: torch.dtype
    causal: bool
    train: bool  # forward and backward, or forward alone

    @property
    def name(self) -> str:
        dtype, mask = str(self.dtype).removeprefix("torch."), "causal" if self.causal else "full"
        return f"{self.mix}-{dtype}-d{self.size}-{mask}-{'train' if self.train else 'forward'}"


def test_varlen_attention(case: Case, race: Callable[[Lineup], object]) -> None:
    race(case.build())


def cases(*, quick: bool, device: str) -> list[Case]:
    """Return the races."""
    fp32, bf16 = torch.float32, torch.bfloat16
    both = (False, True)
    if quick:
        shapes = [Shape("few", 2, 32, fp32, True, True), Shape("few", 2, 32, bf16, False, False)]
    elif device == "cuda":
        shapes = [Shape("mixed", 16, 64, bf16, causal, train) for causal in both for train in both]
        shapes += [Shape("long", 16, 128, bf16, True, train) for train in both]
        shapes += [Shape("short", 16, 64, bf16, True, True)]
    else:
        shapes = [Shape("mixed", 8, 64, fp32, causal, train) for causal in both for train in both]
        shapes += [Shape("short", 8, 64, fp32, causal, True) for causal in both]
        shapes += [Shape("mixed", 8, 64, bf16, True, True)]
    return [Case(shape.name, functools.partial(_lineup, shape, device, quick)) for shape in shapes]


def _lengths(mix: str) -> list[int]:
    """Return the lengths of the documents, log-normal, the same on every machine."""
    if mix == "long":
        return [4096] * 8
    count, typical, low, high = _MIXES[mix]
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return (noise * 0.8 + math.log(typical)).exp().round().clamp(low, high).int().tolist()


def _inputs(shape: Shape, device: str) -> Packed:
    lengths, generator = _lengths(shape.mix), torch.Generator().manual_seed(0)
    size = (sum(lengths), shape.heads, shape.size)
    q, k, v, grad = (
        torch.randn(size, generator=generator).to(device, shape.dtype) for _ in range(4)
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
    return Lineup(
        ours=timed(_ours(x, "fused"), x),
        peers=_loops(x) | _padded(x) | _masked(x, quick=quick) | _packages(x),
        what=what,
        truth=timed(_exact(x), x, dtype=torch.float64),
        tolerance=_TOLERANCE[x.grad.dtype],
        # two matrix products forward, five backward
        flops=4 * x.pairs * H * D * (3.5 if x.train else 1),
        dtype=dtype,
    )


def _ours(x: Packed, impl: str) -> Forward:
    cu, longest = x.cu_seqlens, max(x.lengths)
    return lambda q, k, v: varlen_attention(
        q, k, v, cu, max_seqlen_q=longest, causal=x.causal, impl=impl
    )


def _heads_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)[None]  # (1, H, T, D)


def _attend(x: Packed, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    heads = (_heads_first(t) for t in (q, k, v))
    causal = x.causal and mask is None
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=causal)
    return out[0].transpose(0, 1)


def _exact(x: Packed) -> Forward:
    """Return softmax attention of each document by itself, written out."""

    def document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
        if x.causal:
            scores = scores.where(torch.ones_like(scores[0], dtype=torch.bool).tril(), -math.inf)
        return torch.einsum("hts,shd->thd", scores.softmax(-1), v)

    return _per_document(document, x)


def _per_document(document: Forward, x: Packed) -> Forward:
    def forward(*tensors: Tensor) -> Tensor:
        pieces = zip(*(t.split(x.lengths) for t in tensors), strict=True)
        return torch.cat([document(q, k, v) for q, k, v in pieces])

    return forward


def _loops(x: Packed) -> dict[str, Call | Peer]:
    ends = x.cu_seqlens.tolist()
    spans = [slice(start, end) for start, end in itertools.pairwise(ends)]

    def by_slices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([_attend(x, q[span], k[span], v[span]) for span in spans])

    by_split = _per_document(functools.partial(_attend, x), x)
    return {
        "SDPA per document, split": timed(by_split, x),
        "SDPA per document, q[s:e]": timed(by_slices, x),
        "our reference": timed(_ours(x, "reference"), x),
    }


def _padded(x: Packed) -> dict[str, Call | Peer]:
    """Return attention on padded batches; padding and its removal are not timed."""
    N, L = len(x.lengths), max(x.lengths)
    ends = torch.arange(L, device=x.grad.device)
    valid = ends < torch.tensor(x.lengths, device=ends.device)[:, None]  # (N, L)
    mask = valid[:, None, None, :]
    mask = mask & (ends <= ends[:, None]) if x.causal else mask

    def pad(tensor: Tensor) -> Tensor:
        padded = tensor.new_zeros(N, L, *tensor.shape[1:])
        padded[valid] = tensor
        return padded.transpose(1, 2).contiguous()  # (N, H, L, D)

    def unpack(outputs: Outputs) -> Outputs:
        return tuple(output.transpose(1, 2)[valid] for output in outputs)

    def peer(**options: Tensor | bool) -> Peer:
        forward = functools.partial(F.scaled_dot_product_attention, **options)
        return Peer(timed(forward, padded), unpack=unpack, expected=N * L * L / x.pairs)

    q, k, v, grad = (pad(t) for t in (*x.tensors, x.grad))
    padded = replace(x, tensors=(q, k, v), grad=grad)
    found: dict[str, Call | Peer] = {"padded SDPA, mask": peer(attn_mask=mask)}
    return found | {"padded SDPA, is_causal": peer(is_causal=True)} if x.causal else found


def _masked(x: Packed, *, quick: bool) -> dict[str, Call | Peer]:
    T = len(x.grad)
    on_cpu = x.grad.device.type == "cpu"

    # made once, as a model does, and only if the peer is called
    @functools.cache
    def mask() -> Tensor:
        same = x.documents == x.documents[:, None]
        return same.tril() if x.causal else same

    block = timed(lambda q, k, v: _attend(x, q, k, v, mask()), x)
    # the nested path of the CPU: 26 s against 0.3 s of the loop over documents (64 of them,
    # bidirectional, forward, one core of a Xeon with AMX, torch 2.13, 2026-11-21)
    nested = Peer(timed(_nested(x), x), expected=80 if on_cpu and not x.causal else 1)
    return {
        "SDPA, block-diagonal mask": Peer(block, expected=T * T / x.pairs),
        "SDPA, nested jagged": nested,
        "flex_attention, compiled": Peer(reason="compiling takes longer than a quick run")
        if quick and on_cpu
        else Peer(timed(_flex(x), x), compiled=True),
    }


def _nested(x: Packed) -> Forward:
    cu, shortest, longest = x.cu_seqlens.long(), min(x.lengths), max(x.lengths)

    def forward(*tensors: Tensor) -> Tensor:
        make = functools.partial(torch.nested.nested_tensor_from_jagged, offsets=cu)
        q, k, v = (
            make(t, min_seqlen=shortest, max_seqlen=longest).transpose(1, 2) for t in tensors
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=x.causal)
        return out.transpose(1, 2).values()

    return forward


def _flex(x: Packed) -> Forward:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    documents, T = x.documents, len(x.grad)

    def visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = documents[i] == documents[j]
        return same & (i >= j) if x.causal else same

    @functools.cache
    def prepare() -> tuple[Callable[..., Tensor], BlockMask]:
        # a graph of another case must not count against the limit of recompilations
        torch.compiler.reset()
        mask = create_block_mask(visible, None, None, T, T, device=x.grad.device)
        return torch.compile(flex_attention, dynamic=False), mask

    def forward(*tensors: Tensor) -> Tensor:
        q, k, v = (_heads_first(t) for t in tensors)
        if q.device.type == "cpu" and q.requires_grad:
            # refuses with its own words, before the seconds that the mask takes
            flex_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1])
        attend, mask = prepare()
        return attend(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return forward


def _packages(x: Packed) -> dict[str, Call | Peer]:
    found: dict[str, Call | Peer] = {"torch varlen_attn": timed(_torch_varlen(x), x)}
    return found if x.grad.device.type == "cpu" else found | {"flash-attn": timed(_flash(x), x)}


def _torch_varlen(x: Packed) -> Forward:
    cu, longest = x.cu_seqlens, max(x.lengths)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        # torch 2.10 has a flag, later versions a window
        flag = "is_causal" in inspect.signature(varlen_attn).parameters
        window = {"window_size": (-1, 0 if x.causal else -1)}
        attend = functools.partial(varlen_attn, **({"is_causal": x.causal} if flag else window))
        return cast(Tensor, attend(q, k, v, cu, cu, longest, longest))

    return forward


def _flash(x: Packed) -> Forward:
    cu, longest = x.cu_seqlens, max(x.lengths)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=x.causal)

    return forward
