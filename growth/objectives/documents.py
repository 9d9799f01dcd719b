"""Losses of documents that stand side by side in one packed row."""

from typing import NamedTuple

import torch
from torch import Tensor


class DocumentLosses(NamedTuple):
    """The mean loss of each document over its labelled tokens, and how many those are."""

    mean: Tensor  # (N,) float64, 0 where a document has no label
    tokens: Tensor  # (N,) int64


def document_losses(losses: Tensor, valid: Tensor, cu_seqlens: Tensor) -> DocumentLosses:
    """Return the mean loss of every document of a packed batch, without gradients.

        mean_n = sum_{t in document n, valid} losses_t / tokens_n

    Shapes: losses, valid (T,); cu_seqlens (N+1,) integers from 0 to T, as attention takes them.
    Precision: sums in float64, each over one document alone. Deterministic; no host sync.

    Args:
        losses: one per token, for example `linear_cross_entropy(...).nll`.
        valid: True where a token has a label; the loss elsewhere is never read.
        cu_seqlens: where each document begins; a document may be empty.

    Source: ours.
    """
    offsets = cu_seqlens.long()
    known = torch.where(valid, losses.detach(), 0).double()
    sums = torch.segment_reduce(known, "sum", offsets=offsets, unsafe=True, initial=0)
    counts = torch.cat([offsets.new_zeros(1), valid.long().cumsum(0)])
    tokens = counts[offsets[1:]] - counts[offsets[:-1]]
    return DocumentLosses(sums / tokens.clamp(min=1), tokens)


def document_of_tokens(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the number of the document of each of `tokens` tokens; N behind the last document.

    Shapes: cu_seqlens (N+1,); result (T,) int64.
    """
    places = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True)
