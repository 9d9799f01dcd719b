"""What a loop needs to know of a packed batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .packing import PackedBatch


def piece_lengths(batch: PackedBatch) -> list[int]:
    """Return the lengths of the pieces in a batch, in tokens."""
    return batch.cu_seqlens.diff().tolist()


def predicted_tokens(batch: PackedBatch) -> int:
    """Return how many labels of a batch count in its loss."""
    return int((batch.labels != -100).sum())


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a model's inputs with their tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
