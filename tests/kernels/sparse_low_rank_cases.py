"""Weights of every kind of support, and the product with them in float64 and in plain PyTorch."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from apical import Support, sparse_low_rank

cpu = importlib.import_module("apical.kernels.sparse_low_rank._cpu")

IMPLEMENTATIONS = ("native", "torch")
NAMES = ("input", "a", "b", "values", "bias")
# 300 rows are two rows of blocks of 128 and a cut one; 52 columns leave 4 beside blocks of 16 wide,
# are no multiple of a vector and of 4 for n of m
N, M = 300, 52
# neither a power of two nor 1: it must arrive everywhere, once
SCALE = 1.7


def _explicit(n: int, m: int) -> Support:
    # one full row, one full column, every other row and column nearly empty
    row = torch.arange(m) + (n // 2) * m
    column = torch.arange(n) * m + m // 3
    return Support.explicit(torch.cat([row, column]).unique(), n, m)


SUPPORTS: dict[str, Callable[[int, int], Support]] = {
    "uniform": lambda n, m: Support("uniform", n, m, 0.06),
    # rows without an entry
    "uniform-thin": lambda n, m: Support("uniform", n, m, 0.005),
    # every entry
    "uniform-full": lambda n, m: Support("uniform", n, m, 1.0),
    "regular": lambda n, m: Support("regular", n, m, 0.1),
    "nm": lambda n, m: Support("nm", n, m, 0.5),
    "explicit": _explicit,
    "grouped": lambda n, m: Support("grouped", n, m, 0.4),
    # rows of blocks without a block
    "grouped-thin": lambda n, m: Support("grouped", n, m, 0.1, block=(32, 16)),
    "grouped-full": lambda n, m: Support("grouped", n, m, 1.0, block=(64, 16)),
    # blocks smaller than any vector, of odd sizes
    "grouped-odd": lambda n, m: Support("grouped", n, m, 0.2, block=(7, 3)),
}


class Operands(NamedTuple):
    """What a product is made of, as leaves."""

    input: Tensor
    a: Tensor
    b: Tensor
    values: Tensor
    bias: Tensor | None


def sample(
    support: Support, *leading: int, rank: int = 7, bias: bool = True, dtype=torch.float32
) -> Operands:
    n, m = support.out_features, support.in_features
    shapes = ((*leading, m), (rank, m), (n, rank), (support.stored,), (n,))
    x, a, b, values, c = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    return Operands(x, a, b, values, c if bias else None)


def as_leaves(operands: Operands, dtype: torch.dtype) -> Operands:
    x, a, b, values, bias = (
        None if t is None else t.detach().to(dtype).requires_grad_() for t in operands
    )
    assert x is not None
    assert a is not None
    assert b is not None
    assert values is not None
    return Operands(x, a, b, values, bias)


def by_hand(operands: Operands, support: Support) -> Tensor:
    """The definition, on the whole weight."""
    x, a, b, values, bias = operands
    return x @ (SCALE * (b @ a) + scattered(values, support)).t() + (0 if bias is None else bias)


def in_parts(operands: Operands, support: Support) -> Tensor:
    """The definition, without the product of the factors."""
    x, a, b, values, bias = operands
    low_rank = SCALE * (x @ a.t()) @ b.t() + (0 if bias is None else bias)
    return low_rank + x @ scattered(values, support).t()


def scattered(values: Tensor, support: Support) -> Tensor:
    n, m = support.out_features, support.in_features
    return values.new_zeros(n * m).index_put((support.flat(),), values).view(n, m)


def with_grads(
    call: Callable[[Operands], Tensor], operands: Operands, upstream: Tensor
) -> list[Tensor]:
    """The product and the gradients of all operands."""
    leaves = [t for t in operands if t is not None]
    output = call(operands)
    return [output, *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


def fused(operands: Operands, support: Support, recompute_hidden: bool = False) -> Tensor:
    x, a, b, values, bias = operands
    return sparse_low_rank(
        x, a, b, values, support, bias=bias, scale=SCALE, recompute_hidden=recompute_hidden
    )


def force(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the C++ library's products, or those of machines without it."""
    if name == "torch":
        monkeypatch.setattr(cpu, "takes", lambda input, layout: False)  # noqa: A006
    elif not cpu.takes(torch.empty(0), [0, 1, 1, 1, 1]):
        pytest.skip("the C++ library is not built")
