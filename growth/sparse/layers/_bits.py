"""Masks of one bit an entry."""

import torch
from torch import Tensor


def packed_size(entries: int) -> int:
    """Return the bytes that hold so many bits."""
    return -(-entries // 8)


def pack(mask: Tensor) -> Tensor:
    """Return a mask of any shape as bytes (ceil(entries / 8),) uint8: entry i is bit i % 8."""
    flat = mask.flatten()
    bits = flat.new_zeros(8 * packed_size(flat.numel()), dtype=torch.uint8)
    bits[: flat.numel()] = flat
    return (bits.view(-1, 8) << _places(bits)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return the mask (n, m) bool that was packed."""
    # the eight entries of every byte there is, eight bytes at a time: several times faster on the
    # CPU than a shift for each entry
    every = torch.arange(256, dtype=torch.uint8, device=packed.device)[:, None]
    entries = ((every >> _places(packed)) & 1).view(torch.int64).flatten()
    bits = entries.index_select(0, packed.int()).view(torch.bool)
    return bits[: shape.numel()].view(shape)


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
