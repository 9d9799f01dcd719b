"""Other libraries' kernels behind the same function: chosen by name, never fallen back to."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._layout import PackedLayout
from ._rules import UNBOUNDED, Rules


def forward(
    impl: str, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, rules: Rules
) -> Tensor:
    """Return attention by ``"torch"`` (its varlen_attn) or ``"flash-attn"`` (Dao-AILab's).

    Raises:
        ValueError: the library has no such attention.
        NotImplementedError: the library or a device it runs on is not there.
    """
    lacks = _lacking(impl, q, v, rules)
    if lacks:
        raise ValueError(f"impl={impl!r} has no {', '.join(lacks)}; use impl='fused'")
    if not q.is_cuda:
        raise NotImplementedError(f"impl={impl!r} runs on CUDA only, q is on {q.device}")
    layout = layout.to(q.device)
    bounds = layout.cu_seqlens_q.int(), layout.cu_seqlens_k.int()
    longest = layout.max_seqlen_q, layout.max_seqlen_k
    window = tuple(-1 if side == UNBOUNDED else side for side in (rules.left, rules.right))
    run = _torch if impl == "torch" else _flash_attn
    # rows after the last boundary are left unwritten there
    end, end_k = layout.bounds_q[-1], layout.bounds_k[-1]
    out = run(q[:end], k[:end_k], v[:end_k], *bounds, *longest, window, rules)
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, len(q) - end))


def _lacking(impl: str, q: Tensor, v: Tensor, rules: Rules) -> list[str]:
    lacks = []
    if q.dtype not in (torch.float16, torch.bfloat16):
        lacks.append(f"{q.dtype}")
    if q.shape[2] != v.shape[2]:
        lacks.append("values of another head size")
    if rules.sinks is not None:
        lacks.append("sinks")
    if rules.transform not in ("none", "softcap") or rules.limit != UNBOUNDED:
        lacks.append("softplus weights or global tokens")
    if impl == "torch":
        extra = {
            "softcap": rules.transform == "softcap",
            "alibi_slopes": rules.alibi_slopes is not None,
            "dropout_p": rules.dropout > 0,
        }
        lacks += [name for name, wanted in extra.items() if wanted]
    return lacks


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
    window: tuple[int, ...],
    rules: Rules,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.10 knows is_causal, later ones windows and grouped heads
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"scale": rules.scale, "window_size": window}
    options |= {"enable_gqa": q.shape[1] != k.shape[1]}
    if "window_size" not in known:
        options = {"is_causal": rules.causal}
        if not (rules.full or rules.causal) or rules.scale != q.shape[2] ** -0.5:
            raise NotImplementedError("impl='torch' of this torch has neither windows nor scales")
    options = {name: value for name, value in options.items() if name in known}
    if q.shape[1] != k.shape[1] and "enable_gqa" not in known:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    call: Callable[..., Any] = varlen_attn
    return call(q, k, v, cu_q, cu_k, longest_q, longest_k, **options)


def _flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
    window: tuple[int, ...],
    rules: Rules,
) -> Tensor:
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise NotImplementedError(
            "impl='flash-attn' needs the flash-attn package: pip install flash-attn"
        ) from error
    return flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, longest_q, longest_k,
        dropout_p=rules.dropout,
        softmax_scale=rules.scale,
        causal=rules.right == 0,
        window_size=window,
        softcap=rules.a if rules.transform == "softcap" else 0.0,
        alibi_slopes=rules.alibi_slopes,
        deterministic=True,
    )  # fmt: skip
