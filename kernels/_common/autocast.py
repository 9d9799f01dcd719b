"""Kernels and torch.autocast: what is computed inside a kernel is the kernel's own choice."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_autocast(kernel: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return the kernel run without autocast, which would round the sums inside it as well.

    The device is that of the first argument, a tensor.
    """

    @functools.wraps(kernel)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        with torch.autocast(first.device.type, enabled=False):
            return kernel(*args, **kwargs)

    return run
