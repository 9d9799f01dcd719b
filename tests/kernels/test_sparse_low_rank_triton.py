"""The Triton kernels of blocks under the interpreter, against dense products in float64."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from apical.kernels._common.triton_tiles import Tiles
from apical.kernels.sparse_low_rank import Support, _triton, _triton_launch

from .linear_cross_entropy_interpreted import (
    INTERPRETED,
    bfloat16_products,  # noqa: F401 - a fixture of every test
    relative,
)

pytestmark = INTERPRETED

SCALE = 0.3
# the interpreter cuts a result to its dtype, a GPU rounds, which is half of the error
ROUNDED = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
NAMES = "input", "a", "b", "values", "bias"


@pytest.fixture(autouse=True, params=["pointer", "tma"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of which even these shapes have several, in both ways to load."""

    def only(*_: object, tma: bool, columns: int, depth: int, **__: object) -> list[Any]:
        fits = math.gcd(columns, 32), math.gcd(depth, 16)
        return [Tiles(tma and request.param == "tma", 16, *fits, 4, 2)]

    monkeypatch.setattr(_triton_launch, "configurations", only)
    # several parts of the tokens
    monkeypatch.setattr(_triton_launch, "_SPAN", 16)


class Layer(NamedTuple):
    input: Tensor
    a: Tensor
    b: Tensor
    values: Tensor
    bias: Tensor | None
    support: Support

    @property
    def layout(self) -> list[int]:
        return [1, len(self.b), self.a.shape[1], *self.support.block]

    @property
    def listed(self) -> list[Tensor]:
        return list(self.support.index("cpu"))

    def weight(self, leaves: list[Tensor]) -> Tensor:
        _, a, b, values, *_ = leaves
        flat = torch.zeros(b.shape[0] * a.shape[1], dtype=torch.float64)
        flat = flat.index_put((self.support.flat(),), values)
        return SCALE * b @ a + flat.view(b.shape[0], a.shape[1])


def layer(
    *,
    tokens: int = 37,
    rows: int = 70,
    columns: int = 72,
    rank: int = 20,
    block: tuple[int, int] = (32, 16),
    density: float = 0.3,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Layer:
    support = Support("grouped", rows, columns, density, seed=3, block=block)
    shapes = (tokens, columns), (rank, columns), (rows, rank), (support.stored,), (rows,)
    x, a, b, values, extra = (torch.randn(shape).to(dtype) for shape in shapes)
    return Layer(x, a, b, values, extra if bias else None, support)


def exact(given: Layer, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [x.double().requires_grad_() for x in given[:5] if x is not None]
    bias = leaves[4] if given.bias is not None else None
    out = torch.nn.functional.linear(leaves[0], given.weight(leaves), bias)
    return out.detach(), torch.autograd.grad(out, leaves, grad.double())


def both(
    given: Layer, grad: Tensor, *, again: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    rest = given.listed, given.layout, SCALE
    out, hidden = _triton.forward(*given[:5], *rest)
    kept = hidden.new_empty(0) if again else hidden
    wanted = [True] * 4 + [given.bias is not None]
    return out, hidden, _triton.backward(grad, *given[:4], kept, *rest, wanted)


def check(given: Layer, *, grad: Tensor | None = None, again: bool = False) -> None:
    """Hold result and gradients to float64: errors relative to the norm."""
    budget = ROUNDED[given.input.dtype]
    if grad is None:
        grad = torch.randn(len(given.input), len(given.b)).to(given.input.dtype)
    true, gradients = exact(given, grad)
    out, hidden, got = both(given, grad, again=again)
    assert relative(out, true) <= budget
    assert relative(hidden, given.input.double() @ given.a.double().t()) <= budget
    for name, actual, wanted in zip(NAMES, got, gradients, strict=False):
        assert actual.dtype == given.input.dtype
        assert relative(actual, wanted) <= budget, name


@pytest.mark.parametrize(
    "shape",
    [
        # no size is a multiple of a tile, the last group has 6 rows, 8 columns are in no block
        pytest.param({}, id="ragged"),
        # what descriptors can address, tiles that are full
        pytest.param({"tokens": 64, "rows": 64, "columns": 64, "rank": 16}, id="full"),
        pytest.param({"tokens": 1, "rows": 5, "columns": 16, "rank": 1, "density": 1.0}, id="tiny"),
        # one group, smaller than a block
        pytest.param({"rows": 20, "block": (128, 16)}, id="one-group"),
        pytest.param({"bias": False}, id="no-bias"),
        # most groups have no block at all
        pytest.param({"rows": 160, "density": 0.07}, id="empty-groups"),
        # every block is stored
        pytest.param({"density": 1.0}, id="all-blocks"),
    ],
)
def test_shapes(shape: dict[str, Any]):
    check(layer(**shape))


# widths that no tile divides, that are no power of two, and that are wider than a tile
@pytest.mark.parametrize("block", [(16, 8), (48, 20), (64, 36), (32, 1)], ids=str)
def test_blocks(block: tuple[int, int]):
    check(layer(block=block, rows=150))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype):
    check(layer(dtype=dtype))
    check(layer(tokens=64, rows=64, columns=64, rank=16, dtype=dtype))


def test_hidden_is_computed_again():
    check(layer(), again=True)


def test_any_strides():
    given = layer()
    # rows apart, and columns apart
    spread = torch.randn(37, 144)[:, ::2]
    apart = torch.randn(37, 200)[:, 7:77]
    check(given._replace(input=spread, a=torch.randn(72, 20).t(), b=torch.randn(20, 70).t()))
    check(given._replace(input=torch.randn(37, 100)[:, 11:83]), grad=apart)
    check(given, grad=torch.randn(70).expand(37, 70))


def test_only_what_is_wanted():
    given = layer()
    grad = torch.randn(37, 70)
    _, gradients = exact(given, grad)
    hidden = given.input @ given.a.t()
    rest = given.listed, given.layout, SCALE
    for i in range(5):
        got = _triton.backward(grad, *given[:4], hidden, *rest, [j == i for j in range(5)])
        assert [x.shape == (0,) for x in got] == [j != i for j in range(5)]
        assert relative(got[i], gradients[i]) <= 1e-6


def test_no_tokens():
    given = layer(tokens=0)
    out, hidden, got = both(given, torch.empty(0, 70))
    assert (out.shape, hidden.shape) == ((0, 70), (0, 20))
    for actual, leaf in zip(got, exact(given, torch.empty(0, 70))[1], strict=True):
        assert torch.equal(actual, leaf.float())


# products with what is not finite
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_neighbours_change_no_bit_of_a_token():
    given, grad = layer(), torch.randn(37, 70)
    before = both(given, grad)
    given.input[5], grad[5] = math.inf, math.nan
    after = both(given, grad)
    rows = torch.arange(37) != 5
    assert torch.equal(before[0][rows], after[0][rows])
    assert torch.equal(before[2][0][rows], after[2][0][rows])


def test_parts_of_tokens_are_summed_alike():
    given, grad = layer(tokens=100), torch.randn(100, 70)
    assert _triton_launch._span(100, 2, 4, 16) < 100
    first, second = both(given, grad)[2], both(given, grad)[2]
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("rows", [8, 24])
def test_other_rows_are_refused(rows: int):
    given = layer(block=(rows, 16))
    with pytest.raises(NotImplementedError, match=f"blocks of {rows} rows have no fused kernel"):
        _triton.forward(*given[:5], given.listed, given.layout, SCALE)
