"""Random permutations as a function of a key: any element, on any device, in any order."""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 6


def permuted(index: Tensor, size: int, *key: int | Tensor) -> Tensor:
    """Return where a permutation of 0 .. size - 1, chosen by the key, sends each index.

    Shapes: index any shape, int64, in 0 .. size - 1; key numbers below 2 ** 32 or tensors of them
    that broadcast with index; result int64, index's shape. Integers alone, so the same bits on
    every device.

    Source: Luby and Rackoff 1988 (Feistel networks); Black and Rogaway 2002 (cycle walking).
    """
    bits = max((size - 1).bit_length(), 2)
    index, seed = torch.broadcast_tensors(index, _absorb(index, key))
    out = _feistel(index, bits, seed)
    # the network permutes a power of two: what leaves the range goes through it again
    while (outside := out >= size).any():
        out = torch.where(outside, _feistel(out, bits, seed), out)
    return out


def _absorb(index: Tensor, key: tuple[int | Tensor, ...]) -> Tensor:
    seed = torch.zeros((), dtype=torch.int64, device=index.device)
    for word in key:
        seed = _mixed((seed + word + 0x9E3779B9) & _WORD)
    return seed


def _feistel(value: Tensor, bits: int, seed: Tensor) -> Tensor:
    # halves of unequal width change places every round
    width, other = bits // 2, bits - bits // 2
    high, low = value >> other, value & (1 << other) - 1
    for step in range(_ROUNDS):
        word = _mixed((low ^ seed) + step * 0x9E3779B9 & _WORD)
        high, low = low, (high ^ word) & (1 << width) - 1
        width, other = other, width
    return high << other | low


def _mixed(word: Tensor) -> Tensor:
    # the finalizer of MurmurHash3, in 64 bits: factors are below 2 ** 32, products wrap harmlessly
    word = (word ^ word >> 16) * 0x85EBCA6B & _WORD
    word = (word ^ word >> 13) * 0xC2B2AE35 & _WORD
    return word ^ word >> 16
