"""Torch's own products with 2:4 sparse weights, on the GPUs that have them."""

import torch
from torch import Tensor, nn
from torch.nn import functional


def semi_structured(linear: nn.Linear, mask: Tensor) -> nn.Linear:
    """Return a dense layer with its weight as torch's semi-structured tensor, for inference.

    Raises:
        ValueError: more than two of four entries are stored, or the dtype is not half precision.
        NotImplementedError: the device has no such product.
    """
    weight = linear.weight
    # what is missing of the last four is stored as little as what is masked
    fours = functional.pad(mask, (0, -mask.shape[1] % 4)).unflatten(1, (-1, 4))
    if (fours.sum(2) > 2).any():
        raise ValueError(
            "mask stores more than 2 of 4 entries in a row; expected support='nm' with block=(2, 4)"
        )
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"weight is {weight.dtype}; expected float16 or bfloat16: cast the layer")
    if not _has_products(weight.device):
        raise NotImplementedError(
            f"{weight.device} has no semi-structured products; they need an NVIDIA GPU of "
            "capability 8.0, elsewhere use the layer itself or to_dense()"
        )
    found = torch.sparse.to_sparse_semi_structured(weight.detach())
    linear.weight = nn.Parameter(found, requires_grad=False)
    return linear.requires_grad_(False).eval()


def _has_products(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
