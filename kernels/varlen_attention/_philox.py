"""Random bits as a function of a counter: the same on every device, in any order of computing."""

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Return the first of the four words of Philox4x32-10, as int64.

    Shapes: seed (1,) int64, its low word the first half of the key; four words of counter, int64,
    broadcast against each other; result as they broadcast, 0 to 2 ** 32 - 1.

    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
    """
    key = [seed & _WORD, seed >> 32 & _WORD]
    c0, c1, c2, c3 = (word & _WORD for word in counter)
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [word + step & _WORD for word, step in zip(key, _WEYL, strict=True)]
    return c0


def _multiply(word: Tensor, by: int) -> tuple[Tensor, Tensor]:
    # the product has 64 bits and int64 63: in two halves
    high, low = (word >> 16) * by, (word & 0xFFFF) * by
    return high + (low >> 16) >> 16, ((high & 0xFFFF) << 16) + low & _WORD


def kept(
    seed: Tensor, rate: float, *, rows: Tensor, keys: Tensor, heads: int
) -> Tensor:  # (H, I, J)
    """Return which attention weights dropout keeps: those whose bits are at least the rate.

    Shapes: rows (I,) of the packed queries; keys (J,) counted within their document; result
    (heads, I, J) bool.
    """
    head = torch.arange(heads, device=rows.device)[:, None, None]
    zero = torch.zeros((), dtype=torch.int64, device=rows.device)
    return philox(seed, (keys[None, None], rows[None, :, None], head, zero)) >= int(rate * 2**32)
