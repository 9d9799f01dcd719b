"""What every layer of this folder is: a drop-in for nn.Linear that stores no dense weight."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._dense import weight_of
from ._weight import DenseWeight

Layer = TypeVar("Layer", bound="StructuredLinear")


class StructuredLinear(nn.Module):
    """y = x W^T + bias, with a weight W (n, m) = (out_features, in_features) of some structure.

    A layer adds its parameters, `reset_parameters`, `forward`, `dense_weight`, `flops` and, to
    `settings`, its own arguments. A model that reads `weight` by itself gets a `DenseWeight`.
    """

    bias: nn.Parameter | None
    # its name in the model that it was made for
    path: str = ""
    # whether a model may compute with `weight` by itself
    readable: bool = True

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        self.in_features, self.out_features = in_features, out_features

    def settings(self) -> dict[str, Any]:
        """Return the arguments that build this layer anew, as JSON holds them."""
        features = {"in_features": self.in_features, "out_features": self.out_features}
        return features | {"bias": self.bias is not None}

    def flops(self, tokens: int) -> int:
        """Return the operations of one forward pass, two for each multiply-add of its products.

        A dense layer has 2 T n m; a bias, like an activation, is not counted. Training costs three
        times as much.
        """
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """Return W (n, m), summed in at least float32 and rounded to the parameters' dtype."""
        raise NotImplementedError

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """Return an nn.Linear with the same weight and bias, in storage of its own.

        Raises:
            ValueError: the layer is sharded, or is no matrix.
        """
        for parameter in self.parameters():
            if type(parameter) is not nn.Parameter:
                raise ValueError(
                    f"{self.path or type(self).__name__} is sharded, as {type(parameter).__name__}"
                    "; load its full state dict into an unsharded model, and make that dense"
                )
        weight = self.dense_weight()
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        trained = any(p.requires_grad for name, p in self.named_parameters() if name != "bias")
        linear.weight = nn.Parameter(weight, requires_grad=trained)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Return the arguments that build this layer anew."""
        return ", ".join(f"{name}={value}" for name, value in self.settings().items())

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            # what is not used of it is not in the graph
            return self._traced_weight() if torch.compiler.is_compiling() else DenseWeight(self)
        return super().__getattr__(name)

    def _traced_weight(self) -> Tensor:
        return self.dense_weight()

    def _take_from(self, linear: nn.Module) -> None:
        """Take bias, requires_grad and training mode of the dense layer that this one replaces."""
        for parameter in self.parameters():
            parameter.requires_grad_(weight_of(linear).requires_grad)
        bias: Any = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(bias.requires_grad)
            if not bias.is_meta:
                self.bias.data.copy_(bias.data)
        self.train(linear.training)


def empty_like(layer: Layer, linear: nn.Module) -> Layer:
    """Move a layer from the meta device to that of a dense layer, without initial values."""
    device = weight_of(linear).device
    return layer if device.type == "meta" else layer.to_empty(device=device)


def check_rank(rank: int, in_features: int, out_features: int) -> None:
    """Raise ValueError unless a matrix (out_features, in_features) can be of this rank."""
    largest = min(in_features, out_features)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= largest:
        raise ValueError(
            f"rank is {rank!r}; expected an integer in 1 .. {largest}, the smaller of "
            f"in_features={in_features} and out_features={out_features}"
        )
