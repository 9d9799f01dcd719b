"""Logits that nobody computed: hidden states that remember what their model does to the logits."""

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from .loss import FusedLoss

# the class has a method of that name
_Float = float


class PendingLogits:
    """Stand-in for ``scale * (hidden @ weight.T + bias)``, or its soft cap, of one head.

    It takes what language models do to their logits: scaling by numbers, the soft cap, a bias per
    word, choosing and reshaping rows, and torch's cross-entropy, which is where it is computed.
    Everything else is refused by name. So what is computed is what the model says, never a guess.
    """

    def __init__(
        self,
        fused: "FusedLoss",
        head: nn.Linear,
        hidden: Tensor,  # (..., H)
        words: int,
        # numerator and denominator, which keep the 1 of a soft cap exact; inside and outside tanh
        inner: tuple[_Float, _Float] = (1.0, 1.0),
        outer: tuple[_Float, _Float] | None = None,
        bias: Tensor | None = None,
    ) -> None:
        self.fused = fused
        self.head = head
        self.hidden = hidden
        self.words = words
        self.inner = inner
        self.outer = outer
        self.bias = bias

    def _with(self, **changes: Any) -> "PendingLogits":
        names = ("hidden", "inner", "outer", "bias")
        values = {name: getattr(self, name) for name in names} | changes
        return PendingLogits(self.fused, self.head, words=self.words, **values)

    def refuse(self, what: str) -> NoReturn:
        """Raise for something that the fused loss cannot do."""
        raise NotImplementedError(
            f"{self.fused.name}: the fused loss does not support {what} between the head and the"
            " loss; call use_kernels(model, loss=False)"
        )

    # what a model may ask of its logits

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.words))

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    def size(self, axis: int | None = None) -> torch.Size | int:
        return self.shape if axis is None else self.shape[axis]

    def dim(self) -> int:
        return self.ndim

    # what changes nothing: the logits of the kernel are float32 whatever the dtype

    def float(self) -> "PendingLogits":
        return self

    def contiguous(self) -> "PendingLogits":
        return self

    def to(self, target: Any) -> "PendingLogits":
        target = target.device if isinstance(target, Tensor) else target
        if not isinstance(target, torch.dtype):
            wanted = torch.device(target)
            if wanted.type != self.device.type or wanted.index not in (None, self.device.index):
                self.refuse(f"moving logits from {self.device} to {wanted}")
        return self

    # what chooses or reshapes rows

    def view(self, *sizes: Any) -> "PendingLogits":
        *rows, width = sizes[0] if isinstance(sizes[0], tuple | list) else sizes
        if width == -1:
            width = math.prod(self.shape) // math.prod(rows)
        if width != self.words:
            self.refuse(f"logits seen as rows of {width}, where the head has {self.words},")
        return self._with(hidden=self.hidden.reshape(*rows, self.hidden.shape[-1]))

    reshape = view

    def __getitem__(self, index: Any) -> "PendingLogits":
        index = index if isinstance(index, tuple) else (index,)
        used = sum(x.ndim if isinstance(x, Tensor) and x.dtype == torch.bool else 1 for x in index)
        reaches_words = used == self.ndim or any(x is Ellipsis for x in index)
        last = index[-1]
        whole = isinstance(last, slice) and last == slice(None)
        if used > self.ndim or any(x is None for x in index) or (reaches_words and not whole):
            self.refuse("choosing among the words of logits")
        return self._with(hidden=self.hidden[index])

    # what a kernel computes along

    def __mul__(self, factor: Any) -> "PendingLogits":
        return self._scaled(self._number(factor), 1.0)

    __rmul__ = __mul__
    mul = __mul__

    def __truediv__(self, divisor: Any) -> "PendingLogits":
        return self._scaled(1.0, self._number(divisor))

    div = __truediv__

    def _number(self, factor: Any) -> _Float:
        if not isinstance(factor, int | _Float) or not math.isfinite(factor) or factor == 0:
            self.refuse(f"a factor that is no plain number other than 0, got {factor!r},")
        return _Float(factor)

    def _scaled(self, up: _Float, down: _Float) -> "PendingLogits":
        if self.outer is None:
            return self._with(inner=(self.inner[0] * up, self.inner[1] * down))
        return self._with(outer=(self.outer[0] * up, self.outer[1] * down))

    def tanh(self) -> "PendingLogits":
        if self.outer is not None:
            self.refuse("a tanh of a tanh")
        return self._with(outer=(1.0, 1.0))

    def __add__(self, bias: Any) -> "PendingLogits":
        fits = isinstance(bias, Tensor) and bias.numel() == self.words == bias.shape[-1]
        if not fits or self.bias is not None or self.outer is not None or self.scale != 1:
            self.refuse("adding something other than one number per word")
        return self._with(bias=bias.reshape(-1))

    def __sub__(self, other: Any) -> NoReturn:
        self.refuse("a difference")

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        self.refuse("writing into logits")

    @property
    def softcap(self) -> _Float | None:
        """The c of ``c * tanh(s / c)``."""
        return None if self.outer is None else self.outer[0] / self.outer[1]

    @property
    def scale(self) -> _Float:
        """The factor in s, on products and bias."""
        up, down = self.outer or (1.0, 1.0)
        return self.inner[0] * up / (self.inner[1] * down)

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: _Float = 0.0,
    ) -> Tensor:
        """Return torch's cross-entropy with these logits, by the kernel."""
        if size_average is not None or reduce is not None:
            self.refuse("size_average and reduce, which reduction replaces,")
        if self.ndim != 2 or target.is_floating_point():
            self.refuse("a cross-entropy that is not of rows with one label each")
        options = {
            "weight": weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        return self.fused.compute(self, target, options)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what a torch function does to such logits: torch calls this in its place."""
        if func is cross_entropy and isinstance(args[0], cls):
            return args[0].cross_entropy(*args[1:], **kwargs or {})
        if func is torch.tanh:
            return args[0].tanh()
        among = _flat((args, *(kwargs or {}).values()))
        return next(x for x in among if isinstance(x, cls)).refuse(func.__name__)

    def __getattr__(self, name: str) -> NoReturn:
        # Python asks for such names where it can do without
        if name.startswith("__"):
            raise AttributeError(name)
        self.refuse(name)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Yield what is in tuples and lists, such as those of `torch.cat`."""
    for value in values:
        yield from _flat(value) if isinstance(value, tuple | list) else [value]
