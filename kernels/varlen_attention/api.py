"""The public face of packed attention."""

import functools
from typing import Any

import torch
from torch import Tensor

from . import _checks as check
from ._autograd import attend
from ._compositions import lambda_attention, softplus_attention
from ._layout import PackedLayout, layout_of
from ._rules import UNBOUNDED, Rules

_WITH_LSE = ("fused", "reference")
_IMPLEMENTATIONS = (*_WITH_LSE, "torch", "flash-attn")


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | PackedLayout,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    global_tokens: int = 0,
    q_global: Tensor | None = None,
    k_global: Tensor | None = None,
    weights: str = "softmax",
    reweight: tuple[float, float] | None = None,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "fused",
) -> Any:
    """Return attention of packed documents; no document sees another.

    Query head h attends with key head h // (H / K). Rows that see no key give 0 and get gradient
    0: of a document without keys, of a causal document with more queries than keys, and all tokens
    after the last boundary.

    Shapes: q (T, H, D); k (S, K, D) and v (S, K, E), H a multiple of K, D and E up to 256;
    cu_seqlens (N + 1,); result (T, H, E), with return_lse and lse (T, H).
    Precision: sums in float32 (float64 for float64); result in q's dtype, lse float32. On CPUs and
    GPUs with matrix units for half precision, probabilities are rounded to it for their products.
    ``"reference"`` computes in q's dtype.
    Deterministic, and a document's bits do not depend on what it is packed with (its dropout does).

    Args:
        q: queries of all documents, one after the other.
        k: keys.
        v: values.
        cu_seqlens_q: int32 or int64 boundaries of the documents in q, on the CPU or q's device:
            document n is rows ``cu_seqlens_q[n]`` to ``cu_seqlens_q[n + 1]``. Starts at 0; empty
            documents are allowed. Or a `PackedLayout`, which all layers of a model can share.
        cu_seqlens_k: the same for k and v; default: those of q.
        max_seqlen_q: longest document; a hint, never read.
        max_seqlen_k: the same for k.
        dropout_p: share of attention weights that are set to 0, the others grow by 1 / (1 - p).
        softmax_scale: factor on the products; default D ** -0.5.
        causal: query i of I sees the keys up to i + J - I of the document's J (bottom right).
        window_size: keys seen to the left and to the right of that place, itself apart; -1: all.
        softcap: scores become softcap * tanh(score / softcap); 0: they do not.
        alibi_slopes: (H,) or (N, H) float32: scores lose slope * distance; no gradient.
        sinks: (H,) logits of a key without a value that every query sees; differentiable.
        global_tokens: a causal window also sees the first so many tokens of its document.
        q_global: (T, H, D) queries for the tokens beyond the window, if they are other ones
            (LM-Infinite's distance limit: rotated to one fixed distance).
        k_global: (S, K, D) the keys for them (not rotated).
        weights: ``"softmax"``, or ``"softplus"``: softplus of the scores over its sum. The scores
            of a query that sees n keys are log(D) log(n) cos(q, k), unless softmax_scale is given.
        reweight: (power, offset) of the second stage of softplus weights A: relu(n A - offset)
            ** power over its sum, without an offset where n is at most 3. The paper's: (15, 1).
        dropout_seed: (1,) int64 on q's device; default: drawn by torch's generator. One seed gives
            the same weights on every device.
        return_lse: also return the log of the softmax's denominator, natural and differentiable.
        impl: ``"fused"`` (one registered operation, differentiable once), ``"reference"`` (plain
            PyTorch, differentiable any number of times), or another library's kernel for what it
            can do: ``"torch"`` (torch.nn.attention.varlen), ``"flash-attn"``.

    Raises:
        ValueError: shapes, dtypes, devices, boundaries or options disagree.
        NotImplementedError: ``impl`` names a library that is not there.

    Source: Dao 2023, arXiv:2307.08691, algorithms 1 and 2; arguments as in that paper's library,
    ``flash_attn_varlen_func``. LM-Infinite: arXiv:2308.16137. Softplus: arXiv:2501.13428.
    """
    cu_q, cu_k = _boundaries(cu_seqlens_q, cu_seqlens_k)
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(_IMPLEMENTATIONS)}; got {impl!r}")
    if return_lse and impl not in _WITH_LSE:
        raise ValueError(f"impl={impl!r} does not differentiate lse; use impl='fused'")
    check.check_heads(q, k, v)
    check.check_boundaries(q, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    check.check_per_head(q, len(cu_q) - 1, alibi_slopes=alibi_slopes, sinks=sinks)
    check.check_scores(
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        weights=weights,
        global_tokens=global_tokens,
    )
    left, right = check.check_window(window_size)
    right = 0 if causal else right
    check.check_reweight(reweight, weights, left=left, right=right)
    check.check_global(q, k, global_tokens, left, causal, q_global=q_global, k_global=k_global)
    rules = Rules(
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.float(),
        sinks=None if sinks is None else sinks.to(torch.promote_types(sinks.dtype, torch.float32)),
        gain=None,
        seed=_seed(q, dropout_p, dropout_seed),
        scale=q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale),
        left=left,
        right=right,
        limit=UNBOUNDED,
        transform="softcap" if softcap else "none",
        a=float(softcap),
        b=0.0,
        dropout=float(dropout_p),
    )
    one = functools.partial(_attend, cu_q, cu_k, impl)
    if global_tokens:
        done = lambda_attention(one, q, k, v, rules, cu_q, global_tokens, q_global, k_global)
    elif weights == "softplus":
        own = softmax_scale is None
        done = softplus_attention(one, q, k, v, rules, cu_q, cu_k, own, reweight)
    else:
        done = one(q, k, v, rules)
    return done if return_lse else done[0]


def _boundaries(
    cu_seqlens_q: Tensor | PackedLayout, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if not isinstance(cu_seqlens_q, PackedLayout):
        # torch.compile refuses one tensor in two places of an autograd.Function
        return cu_seqlens_q, None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
    if cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k is given next to a PackedLayout, which has it; leave it out")
    return cu_seqlens_q.boundaries()


def _seed(q: Tensor, dropout_p: float, dropout_seed: Tensor | None) -> Tensor | None:
    check.check_dropout(q, dropout_p, dropout_seed)
    if dropout_p == 0.0 or dropout_seed is not None:
        return None if dropout_p == 0.0 else dropout_seed
    return torch.randint(0, 2**63 - 1, (1,), device=q.device)


def _attend(
    cu_q: Tensor, cu_k: Tensor | None, impl: str, q: Tensor, k: Tensor, v: Tensor, rules: Rules
) -> tuple[Tensor, Tensor]:
    if impl == "fused":
        return attend(q, k, v, cu_q, cu_k, rules)
    layout = layout_of(cu_q, cu_k, tokens_q=q.shape[0], tokens_k=k.shape[0])
    if impl == "reference":
        from . import _reference as reference

        return reference.forward(q, k, v, layout, rules)
    from . import _peers as peers

    out = peers.forward(impl, q, k, v, layout, rules)
    return out, out.new_full(q.shape[:2], float("nan"))
