"""Products of bfloat16 matrices on the matrix unit, where the processor has one."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from apical.kernels._common import native


def supported() -> bool:
    return native.loaded() and torch.ops.apical.amx_supported()


needs_amx = pytest.mark.skipif(not supported(), reason="no library, or no matrix unit")

# (M, N, K): one element; around a block of 32; each side in turn long enough for several panels
SIZES = [
    (1, 1, 1),
    (31, 33, 32),
    (33, 31, 47),
    (64, 96, 128),
    (40, 300, 65),
    (300, 40, 33),
    (50, 48, 2100),
    (5, 700, 1030),
    (257, 1300, 3),
]


def operands(M: int, N: int, K: int) -> tuple[Tensor, Tensor]:
    return torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()


def product(form: str, a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """Write a (M, K) times b (K, N) to out, the operands stored as the form says."""
    op = getattr(torch.ops.apical, f"amx_product_{form}")
    a = a.t().contiguous() if form[0] == "t" else a
    b = b.t().contiguous() if form[1] == "t" else b
    op(a, b, out, add) if form == "tn" else op(a, b, out)
    return out


def close(got: Tensor, a: Tensor, b: Tensor, start: Tensor | None = None) -> None:
    exact = a.double() @ b.double() + (0 if start is None else start.double())
    # sums in float32: their error grows with the size of the terms, not of the result
    size = a.double().abs() @ b.double().abs() + (0 if start is None else start.double().abs())
    assert ((got.double() - exact).abs() <= 1e-6 * size).all()


@needs_amx
@pytest.mark.parametrize("form", ["nt", "nn", "tn"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size(form, size):
    a, b = operands(*size)
    close(product(form, a, b, torch.full((size[0], size[1]), torch.nan)), a, b)


@needs_amx
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_adds(size):
    a, b = operands(*size)
    start = torch.randn(size[0], size[1])
    close(product("tn", a, b, start.clone(), add=True), a, b, start)


@needs_amx
@pytest.mark.parametrize("form", ["nt", "nn", "tn"])
@pytest.mark.parametrize("size", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_empty(form, size):
    a, b = operands(*size)
    out = product(form, a, b, torch.full((size[0], size[1]), torch.nan))
    assert torch.equal(out, torch.zeros(size[0], size[1]))


@needs_amx
def test_nothing_to_add():
    start = torch.randn(3, 4)
    assert torch.equal(product("tn", *operands(3, 4, 0), start.clone(), add=True), start)


@needs_amx
@pytest.mark.parametrize("form", ["nt", "nn", "tn"])
def test_writes_nothing_else(form):
    a, b = operands(45, 52, 70)
    # the result is in the middle of memory that nothing else may touch, off any alignment
    around = torch.full((45 * 52 + 99,), 7.0)
    out = around[33 : 33 + 45 * 52].view(45, 52)
    close(product(form, a, b, out), a, b)
    assert (around[:33] == 7).all()
    assert (around[33 + 45 * 52 :] == 7).all()


@needs_amx
@pytest.mark.parametrize("form", ["nt", "nn", "tn"])
def test_what_is_not_finite_stays_in_its_row_and_column(form):
    a, b = operands(70, 70, 70)
    a[3, 5], b[6, 40] = torch.nan, torch.inf
    out = product(form, a, b, torch.zeros(70, 70))
    bad = ~out.isfinite()
    assert bad[3].all()
    assert bad[:, 40].all()
    bad[3] = bad[:, 40] = False
    assert not bad.any()


@needs_amx
@pytest.mark.parametrize("form", ["nt", "nn", "tn"])
def test_threads_change_no_bit(form):
    # more threads than column blocks: rows are shared, too
    a, b = operands(300, 90, 1500)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(product(form, a, b, torch.full((300, 90), torch.nan)))
    finally:
        torch.set_num_threads(before)
    close(results[0], a, b)
    for other in results[1:]:
        assert torch.equal(results[0], other)


@needs_amx
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.ones(2, 3)}, "a must be bfloat16"),
        ({"b": torch.ones(3, 4).bfloat16().t()}, "b must be a contiguous matrix"),
        ({"b": torch.ones(4, 5).bfloat16()}, "one size to sum over, got 3 and 5"),
        ({"out": torch.ones(4, 2)}, r"out must be \(2, 4\)"),
        ({"out": torch.ones(2, 4).double()}, "out must be float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_checks_at_the_door(change, message):
    good = {"a": torch.ones(2, 3).bfloat16(), "b": torch.ones(4, 3).bfloat16()}
    good["out"] = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.apical.amx_product_nt(*(good | change).values())


@pytest.mark.skipif(not native.loaded(), reason=native.status()[1])
def test_a_named_instruction_set_leaves_it_out():
    code = """
import torch
from apical.kernels._common import native
assert native.loaded() and not torch.ops.apical.amx_supported()
"""
    environment = {**os.environ, "APICAL_ISA": "baseline"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
