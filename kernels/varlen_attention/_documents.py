"""Which rows of a packed batch attend to which: host integers, checked once for every path."""

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor


class Document(NamedTuple):
    """Rows of one document; ``queries`` begins with the first row that sees a key."""

    queries: slice
    keys: slice


def documents(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, *, tokens_q: int, tokens_k: int, causal: bool
) -> list[Document]:
    """Return the documents in which at least one query sees at least one key, in order.

    Rows outside all of them are those whose result and gradient are 0: fully masked rows, and
    tokens after the last boundary.

    Raises:
        ValueError: boundaries do not start at 0, decrease, or end after the last token.
    """
    name_k = "cu_seqlens_k"
    if cu_seqlens_k is None:
        cu_seqlens_k, name_k = cu_seqlens_q, "cu_seqlens_q, which bounds k too,"
    bounds_q = _boundaries(cu_seqlens_q, name="cu_seqlens_q", tokens=tokens_q)
    bounds_k = _boundaries(cu_seqlens_k, name=name_k, tokens=tokens_k)
    found = []
    for (q, q_end), (k, k_end) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
        # aligned at the bottom right: with fewer keys than queries the first queries see none
        first = max(q, q_end - (k_end - k)) if causal else q
        if first < q_end and k < k_end:
            found.append(Document(slice(first, q_end), slice(k, k_end)))
    return found


def _boundaries(cu_seqlens: Tensor, *, name: str, tokens: int) -> list[int]:
    bounds: list[int] = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0:
        raise ValueError(f"{name} must start with 0, got {bounds[:1]}; prepend the 0")
    for i, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(
                f"{name} must not decrease, got {start} then {end} at document {i}; "
                "pass the cumulative sum of the lengths"
            )
    if bounds[-1] > tokens:
        raise ValueError(
            f"{name} ends at {bounds[-1]}, but there are {tokens} tokens; it must end at or before"
        )
    return bounds
