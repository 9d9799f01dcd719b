"""Documents side by side in one row: where each begins, and each token's place in its document."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def document_bounds(lengths: Sequence[int] | Tensor) -> Tensor:
    """Return the boundaries of N documents: number n is tokens ``bounds[n]`` to ``bounds[n + 1]``.

    Shapes: lengths (N,), a document may be empty; result (N + 1,) int32, as attention takes it.

    Raises:
        ValueError: a length is negative, or there are 2**31 tokens or more.
    """
    bounds = pad(_checked(lengths).cumsum(0), (1, 0))
    if bounds[-1] >= 2**31:
        raise ValueError(
            f"lengths sum to {int(bounds[-1])}, expected less than 2**31: split the row"
        )
    return bounds.int()


def position_ids(lengths: Sequence[int] | Tensor, start: int = 0) -> Tensor:
    """Return each token's position, counted anew in every document.

    Shapes: lengths (N,); result (T,) int64, T their sum.

    Args:
        lengths: tokens of each document; a document may be empty.
        start: position of a document's first token; the RoBERTa family has padding_idx + 1.

    Raises:
        ValueError: a length is negative.
    """
    lengths = _checked(lengths)
    begins = lengths.cumsum(0) - lengths
    total = int(lengths.sum())
    places = torch.arange(start, start + total, device=lengths.device)
    return places - begins.repeat_interleave(lengths, output_size=total)


def _checked(lengths: Sequence[int] | Tensor) -> Tensor:
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    if (lengths < 0).any():
        raise ValueError(f"lengths hold {int(lengths.min())}, expected 0 or more tokens")
    return lengths
