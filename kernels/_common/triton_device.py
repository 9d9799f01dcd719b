"""Where Triton kernels run; imports no Triton."""

import functools
import importlib.util

import torch


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Return whether this is an NVIDIA GPU that the kernels know, and Triton is installed."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    # bfloat16 and asynchronous copies begin there
    enough = torch.cuda.get_device_capability(device) >= (8, 0)
    return enough and importlib.util.find_spec("triton") is not None
