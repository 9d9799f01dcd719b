"""Which documents are alike: exact nearest neighbours by cosine, and a plain embedding of text."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from zlib import crc32

import torch
from torch import Tensor

# cosines are compared in steps above the rounding of float32, so that equal documents tie
_STEPS = 2**20
_WORD = re.compile(r"\w+")


def nearest_neighbours(embeddings: Tensor, k: int, *, block: int = 2048) -> Tensor:
    """Return every document's k nearest others by cosine, the nearest first.

    Exact, by N * N * d multiply-adds; memory besides inputs and result is about 40 bytes times
    block squared. Cosines are compared in steps of 2**-20, ties go to the lower index. A document
    without direction (all zeros) has cosine 0 to all.

    Shapes: embeddings (N, d) floating; result (N, k) int64, without the document itself.

    Raises:
        ValueError: embeddings are not (N, d) or not finite, or `k` is not in 1..N-1.
    """
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings are {embeddings.dtype} {tuple(embeddings.shape)}, expected (N, d) floating"
        )
    if not embeddings.isfinite().all():
        raise ValueError("embeddings hold NaN or infinity: drop or embed these documents again")
    count = len(embeddings)
    if not 1 <= k < count:
        raise ValueError(f"k is {k}, expected 1 to {count - 1}: there are {count} documents")
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    rows = [_nearest(unit, start, k, block) for start in range(0, count, block)]
    return torch.cat(rows)


def hashed_embeddings(texts: Sequence[str], size: int = 2048) -> Tensor:
    """Return an embedding of each text by the words and pairs of words it shares with others.

    A baseline that needs no model: words in other forms, and synonyms, do not match. Each word and
    pair adds 1 + log(count), with a sign of its own, to one of `size` places chosen by its CRC-32;
    places used by many texts weigh less (by the logarithm of their frequency). Texts without
    letters or digits get zeros.

    Shapes: result (len(texts), size) float32, rows of length 1.

    Raises:
        ValueError: `size` is below 1.

    Source: feature hashing, arXiv 0902.2206.
    """
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1")
    vectors = torch.zeros(len(texts), size)
    for vector, text in zip(vectors, texts, strict=True):
        values = _hashed(text, size)
        vector[list(values)] = torch.tensor(list(values.values()))
    used = (vectors != 0).sum(0)
    vectors *= torch.log((1 + len(texts)) / (1 + used)) + 1
    return torch.nn.functional.normalize(vectors, dim=1)


def _nearest(unit: Tensor, start: int, k: int, block: int) -> Tensor:
    """Return the neighbours of one block of rows (rows, k), the columns taken block by block."""
    rows, count = unit[start : start + block], len(unit)
    own = torch.arange(start, start + len(rows), device=unit.device)[:, None]
    best = torch.empty(len(rows), 0, dtype=torch.int64, device=unit.device)
    for first in range(0, count, block):
        cosines = rows @ unit[first : first + block].T
        columns = torch.arange(first, first + cosines.shape[1], device=unit.device)
        # one integer, so that no two are equal: the cosine in steps, then the lower index
        keys = (cosines * _STEPS).round().long() * count + (count - 1 - columns)
        keys.masked_fill_(columns == own, torch.iinfo(torch.int64).min)
        best = torch.cat((best, keys), 1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
    return count - 1 - best % count


def _hashed(text: str, size: int) -> dict[int, float]:
    words = _WORD.findall(text.lower())
    pairs = [f"{one} {other}" for one, other in pairwise(words)]
    values: dict[int, float] = {}
    for term, count in Counter(words + pairs).items():
        code = crc32(term.encode("utf-8", "surrogatepass"))
        sign = 1.0 if code >> 31 else -1.0
        place = (code & 0x7FFFFFFF) % size
        values[place] = values.get(place, 0.0) + sign * (1 + math.log(count))
    return values
