"""The Triton kernel of Monarch under the interpreter, against the definition in float64."""

import math
from typing import Any

import pytest
import torch

from apical.kernels._common.triton_tiles import Tiles
from apical.kernels.monarch import _triton, _triton_launch

from .linear_cross_entropy_interpreted import (
    INTERPRETED,
    bfloat16_products,  # noqa: F401 - a fixture of every test
    relative,
)
from .monarch_cases import SHAPES, Operands, exact, sample

pytestmark = INTERPRETED

# the interpreter cuts a result to its dtype, a GPU rounds, which is half of the error
ROUNDED = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
NAMES = "input", "first", "second", "bias"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of which even these shapes have several."""
    few = [Tiles(None, 16, 16, 16, 4, 2)]
    monkeypatch.setattr(_triton_launch, "configurations", lambda *_: few)


def check(given: Operands, grad: torch.Tensor | None = None) -> None:
    """Hold result and gradients to float64: errors relative to the norm."""
    budget = ROUNDED[given.input.dtype]
    if grad is None:
        grad = torch.randn(len(given.input), given.out_features).to(given.input.dtype)
    true, *gradients = exact(given, grad)
    out, hidden = _triton.forward(*given, True)
    assert relative(out, true) <= budget
    wanted = [True] * 3 + [given.bias is not None]
    got = _triton.backward(grad, *given[:3], hidden, wanted)
    for name, actual, truth in zip(NAMES, got, gradients, strict=False):
        assert actual.dtype == given.input.dtype
        assert relative(actual, truth) <= budget, name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape: dict[str, Any]):
    check(sample(**shape))
    check(sample(**shape, bias=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype):
    check(sample(dtype=dtype))


def test_any_strides():
    given = sample(tokens=20)
    m, n = given.input.shape[1], given.out_features
    apart = given._replace(input=torch.randn(20, 2 * m + 3)[:, 3::2])
    turned = given._replace(
        first=given.first.transpose(1, 2).contiguous().transpose(1, 2),
        second=given.second.transpose(0, 2).contiguous().transpose(0, 2),
    )
    check(apart)
    check(turned, torch.randn(n).expand(20, n))


def test_only_what_is_wanted():
    given = sample()
    grad = torch.randn(len(given.input), given.out_features)
    _, *gradients = exact(given, grad)
    _, hidden = _triton.forward(*given, True)
    for i in range(4):
        kept = hidden if i == 2 else hidden.new_empty(0)
        got = _triton.backward(grad, *given[:3], kept, [j == i for j in range(4)])
        assert [x.shape == (0,) for x in got] == [j != i for j in range(4)]
        assert relative(got[i], gradients[i]) <= 1e-6


# products with what is not finite
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_neighbours_change_no_bit_of_a_token():
    given = sample(tokens=37)
    before, _ = _triton.forward(*given, True)
    given.input[5] = math.nan
    after, _ = _triton.forward(*given, True)
    rows = torch.arange(37) != 5
    assert torch.equal(before[rows], after[rows])
    assert after[5].isnan().all()


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch):
    given, seen = sample(), []
    plain = _triton_launch.product

    def product(out: Any, left: Any, right: Any, bias: Any = None) -> None:
        seen.extend(part.untyped_storage().data_ptr() for part in (out, left, right))
        plain(out, left, right, bias)

    monkeypatch.setattr(_triton_launch, "product", product)
    out, hidden = _triton.forward(*given, True)
    known = {x.untyped_storage().data_ptr() for x in (*given[:3], out, hidden)}
    assert len(seen) == 6
    assert set(seen) == known
