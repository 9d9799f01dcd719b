"""The signature that other code already calls."""

from typing import Any

from torch import Tensor

from .api import varlen_attention


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Return `varlen_attention` under the signature of flash-attn 2's function of this name.

    Shapes: as `varlen_attention`; with return_attn_probs the result, lse (H, T) float32, and None.

    Args:
        q: queries of all documents, one after the other.
        k: keys.
        v: values.
        cu_seqlens_q: boundaries of the documents in q.
        cu_seqlens_k: boundaries in k and v.
        max_seqlen_q: a hint, never read.
        max_seqlen_k: a hint, never read.
        dropout_p: share of attention weights set to 0.
        softmax_scale: factor on the products; default D ** -0.5.
        causal: mask aligned at the bottom right.
        window_size: keys seen to the left and right; -1: all.
        softcap: cap of the scores; 0: none.
        alibi_slopes: (H,) or (N, H).
        deterministic: taken and not needed: the gradients always are.
        return_attn_probs: also return lse; the probabilities themselves are never built.
        block_table: of paged keys; only None.

    Raises:
        ValueError: as `varlen_attention`.
        NotImplementedError: block_table is given.

    Source: Dao-AILab/flash-attention 2.8, flash_attn_interface.py.
    """
    if block_table is not None:
        raise NotImplementedError("block_table: paged keys are for serving; pass packed k and v")
    done = varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=return_attn_probs,
    )
    return (done[0], done[1].T, None) if return_attn_probs else done
