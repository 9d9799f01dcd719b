"""AdamW with moments of 8 bits, from whichever library is installed."""

import importlib
from importlib.util import find_spec
from typing import Any

import torch
from torch.optim import Optimizer

# bitsandbytes needs no compilation before its first step
_LIBRARIES = {"bitsandbytes": "bitsandbytes.optim", "torchao": "torchao.optim"}


def adamw8bit(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    """Return AdamW of bitsandbytes or torchao, with moments in blocks of 8 bits at zero.

    Raises:
        ImportError: neither is installed.

    Source: Dettmers et al. 2022, arXiv 2110.02861.
    """
    library = next((name for name in _LIBRARIES if find_spec(name)), None)
    if library is None:
        raise ImportError(
            "optimizer.kind: adamw8bit needs the package bitsandbytes or torchao: "
            "pip install bitsandbytes"
        )
    optimizer: Optimizer = importlib.import_module(_LIBRARIES[library]).AdamW8bit(groups, **options)
    _make_state(optimizer)
    return optimizer


def _make_state(optimizer: Optimizer) -> None:
    """Make the state that the first step would: there is always one to save and to load."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.grad for p in parameters]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    # a step of no length from no gradient leaves weights and moments as they are
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, grad in zip(parameters, before, strict=True):
        parameter.grad = grad
        # a tensor, so that it is saved and loaded with the others
        optimizer.state[parameter]["step"] = torch.zeros((), dtype=torch.int64)
