"""The dense layers that are replaced: torch's, and transformers' own with the weight transposed."""

import sys
from typing import Any, TypeGuard

from torch import Tensor, nn


def is_dense(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module is an nn.Linear or transformers' Conv1D.

    Neither of their subclasses: what those do with their weight is not known.
    """
    return type(module) in (nn.Linear, _conv1d())


def weight_of(linear: nn.Module) -> Tensor:
    """Return the weight (n, m) of a dense layer, as nn.Linear has it.

    Raises:
        ValueError: the module is no dense layer, or its weight is not of floating point.
    """
    if not isinstance(linear, (nn.Linear, _conv1d() or nn.Linear)):
        raise ValueError(
            f"linear is a {type(linear).__name__}; expected an nn.Linear or transformers' Conv1D"
        )
    weight: Any = linear.weight
    if not weight.is_floating_point():
        raise ValueError(f"linear has a weight of {weight.dtype}; expected floating point")
    return weight if isinstance(linear, nn.Linear) else weight.T


def _conv1d() -> type[nn.Module] | None:
    # a model has one only after transformers was imported: torch alone is enough without it
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)
