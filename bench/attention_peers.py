"""What torch and other libraries offer for documents of different lengths."""

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from packed import Forward, Packed, timed
from race import Call, Outputs, Peer
from torch import Tensor


def peers(x: Packed, *, quick: bool) -> dict[str, Call | Peer]:
    """Return everyone who can be asked for this case, by name."""
    return _loops(x) | _padded(x) | _masked(x, quick=quick) | _packages(x)


def _heads_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)[None]  # (1, H, T, D)


def _attend(x: Packed, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    heads = (_heads_first(t) for t in (q, k, v))
    causal = x.causal and mask is None
    out = F.scaled_dot_product_attention(
        *heads, attn_mask=mask, is_causal=causal, enable_gqa=x.grouped
    )
    return out[0].transpose(0, 1)


def exact(x: Packed) -> Forward:
    """Return softmax attention of each document by itself, written out."""

    def document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
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
        forward = functools.partial(F.scaled_dot_product_attention, enable_gqa=x.grouped, **options)
        return Peer(timed(forward, padded), unpack=unpack, expected=N * L * L / x.pairs)

    q, k, v, grad = (pad(t) for t in (*x.tensors, x.grad))
    padded = replace(x, tensors=(q, k, v), grad=grad)
    found: dict[str, Call | Peer] = {"padded SDPA, mask": peer(attn_mask=mask)}
    if x.causal:
        found["padded SDPA, is_causal"] = peer(is_causal=True)
    if x.grad.is_cuda and x.causal:
        found["padded SDPA, cuDNN"] = replace(
            peer(is_causal=True), call=timed(_cudnn(x.grouped), padded)
        )
    return found


def _cudnn(grouped: bool) -> Forward:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    return forward


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
        out = F.scaled_dot_product_attention(q, k, v, is_causal=x.causal, enable_gqa=x.grouped)
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
        return attend(q, k, v, block_mask=mask, enable_gqa=x.grouped)[0].transpose(0, 1)

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
        options = {"is_causal": x.causal} if flag else window
        if x.grouped:
            options |= {"enable_gqa": True}
        attend = functools.partial(varlen_attn, **options)
        return cast(Tensor, attend(q, k, v, cu, cu, longest, longest))

    return forward


def _flash(x: Packed) -> Forward:
    cu, longest = x.cu_seqlens, max(x.lengths)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=x.causal)

    return forward
