"""What a model gets that reads the weight of a replaced layer by itself."""

from __future__ import annotations

import functools
import logging
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from ._base import StructuredLinear

logger = logging.getLogger(__name__)

# what is known without the weight
_KNOWN = {
    *(
        getattr(Tensor, name).__get__
        for name in ("device", "dtype", "is_cuda", "is_meta", "layout")
    ),
    *(getattr(Tensor, name).__get__ for name in ("ndim", "shape")),
    *(Tensor.__hash__, Tensor.dim, Tensor.is_floating_point, Tensor.numel, Tensor.size),
}
_DATA = getattr(Tensor, "data").__get__  # noqa: B009 - pyright knows no getter
# of a weight that is made for one operation these would be lost, or dangle
_LOST = ("__set__", "data_ptr", "register_hook", "requires_grad_", "untyped_storage")


class DenseWeight(Tensor):
    """The dense weight (n, m) of a layer, made anew for each operation that uses it.

    Its shape, dtype and device cost nothing: some models ask for no more (T5's `wo`). Operations of
    torch get the dense weight, and the layer's parameters its gradient. What would bypass them, a
    kernel that wants memory or its own backward pass, or would write to it, is refused.
    """

    layer: StructuredLinear
    recorded: bool

    @staticmethod
    def __new__(cls, layer: StructuredLinear) -> DenseWeight:
        first = next(layer.parameters())
        shape = layer.out_features, layer.in_features
        make: Any = Tensor._make_wrapper_subclass  # pyright: ignore[reportAttributeAccessIssue]
        weight = make(cls, shape, dtype=first.dtype, device=first.device)
        weight.layer, weight.recorded = layer, torch.is_grad_enabled()
        # transformers' initial values, T5's for example, pass it by
        weight._is_hf_initialized = True
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _KNOWN:
            return super().__torch_function__(func, types, args, kwargs)
        made: list[tuple[DenseWeight, Tensor, int]] = []

        def dense(weight: DenseWeight) -> Tensor:
            if func.__name__ in _LOST or func == _DATA:
                weight._refuse()
            tensor = weight._dense()
            made.append((weight, tensor, tensor._version))
            return tensor

        args, kwargs = tree_map_only(cls, dense, (args, kwargs or {}))
        result = func(*args, **kwargs)
        for weight, tensor, version in made:
            if tensor._version != version:
                weight._refuse()
        return result

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # from C++: too late for a gradient
        tree_map_only(cls, DenseWeight._refuse, (args, kwargs))

    def _dense(self) -> Tensor:
        layer = self.layer
        trained = any(parameter.requires_grad for parameter in layer.parameters())
        # inside of another autograd.Function, which would keep the gradient to itself
        if self.recorded and trained and not torch.is_grad_enabled():
            self._refuse()
        _say(pattern_of(layer.path) or type(layer).__name__)
        try:
            return layer.dense_weight()
        except ValueError as error:
            raise ValueError(f"{_where(layer)}: {error}. {_way_out(layer)}") from None

    def _refuse(self) -> None:
        raise NotImplementedError(
            f"{_where(self.layer)} has no dense weight in memory, and the model passes that to a "
            f"kernel or writes to it. {_way_out(self.layer)}"
        )


def pattern_of(name: str) -> str:
    """Return a module's name with its layer numbers as stars."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _where(layer: StructuredLinear) -> str:
    return layer.path or f"a {type(layer).__name__}"


def _way_out(layer: StructuredLinear) -> str:
    pattern = pattern_of(layer.path)
    return f"Pass exclude=({pattern!r},) to the rule" if pattern else "Leave the layer dense"


@functools.cache
def _say(pattern: str) -> None:
    logger.warning(
        "the model computes with the weight of %s by itself: it is made dense each time; with "
        "exclude=(%r,) in the rule it stays dense",
        *(pattern, pattern),
    )
