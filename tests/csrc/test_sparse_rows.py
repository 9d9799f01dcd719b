"""Products with compressed sparse rows in the C++ library, against float64, on every set."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from apical.kernels._common import native

needs_library = pytest.mark.skipif(not native.loaded(), reason=native.status()[1])


class Rows(NamedTuple):
    """A sparse matrix (n, m) by rows, and activations."""

    input: Tensor  # (T, m)
    grad: Tensor  # (T, n)
    values: Tensor  # (S,)
    starts: Tensor  # (n + 1,)
    columns: Tensor  # (S,)
    mask: Tensor  # (n, m)

    @property
    def dense(self) -> Tensor:
        weight = torch.zeros(self.mask.shape, dtype=torch.float64)
        return weight.masked_scatter(self.mask, self.values.double())


def matrix(rows: int, columns: int, dtype: torch.dtype, *, strided: bool) -> Tensor:
    """Rows of their own, or cut out of a wider matrix whose rest would spoil every sum."""
    if not strided:
        return torch.randn(rows, columns).to(dtype)
    wide = torch.full((rows, columns + 13), torch.nan, dtype=dtype)
    wide[:, 5 : columns + 5] = torch.randn(rows, columns)
    return wide[:, 5 : columns + 5]


def index(mask: Tensor) -> tuple[Tensor, Tensor]:
    counts = mask.sum(1).cumsum(0)
    return torch.cat([counts.new_zeros(1), counts]).int(), mask.nonzero()[:, 1].int()


def sparse(
    T: int, n: int, m: int, density: float, *, dtype=torch.float32, strided: bool = False
) -> Rows:
    mask = torch.rand(n, m) < density
    mask[n // 2] = True  # a row with all columns,
    mask[n // 3] = False  # and one with none
    starts, columns = index(mask)
    values = torch.randn(len(columns)).to(dtype)
    tall = {"dtype": dtype, "strided": strided}
    return Rows(matrix(T, m, **tall), matrix(T, n, **tall), values, starts, columns, mask)


def added(x: Rows, out: Tensor) -> Tensor:
    torch.ops.apical.sparse_add_(out, x.input, x.values, x.starts, x.columns)
    return out


def sampled(x: Rows) -> Tensor:
    return torch.ops.apical.sparse_sampled(x.grad, x.input, x.starts, x.columns)


def close(got: Tensor, exact: Tensor, size: Tensor) -> None:
    """Within float32 sums of terms of this total size; in bfloat16 also within its rounding."""
    rounding = 2.0**-8 * exact.abs() if got.dtype == torch.bfloat16 else 0.0
    # a bound of both kinds of sums, by lanes and one after the other; far below any lost term
    assert ((got.double() - exact).abs() <= 2e-6 * size + rounding + 1e-30).all()


def check(x: Rows, *, strided: bool = False) -> None:
    T, n = x.grad.shape
    start = matrix(T, n, x.input.dtype, strided=strided)
    weight, tokens, up = x.dense, x.input.double(), x.grad.double()
    exact, size = start + tokens @ weight.T, start.abs() + tokens.abs() @ weight.abs().T
    close(added(x, start), exact, size)
    if start._base is not None:  # what lies beside the rows is as it was
        assert start._base[:, :5].isnan().all()
        assert start._base[:, n + 5 :].isnan().all()
    close(sampled(x), (up.T @ tokens)[x.mask], (up.abs().T @ tokens.abs())[x.mask])


SHAPES = {
    "one entry": (1, 1, 1, 1.0),
    "no tokens": (0, 5, 7, 0.5),
    "one token": (1, 33, 40, 0.1),
    "a token less than a pack": (127, 20, 30, 0.2),
    "a token less than two small packs": (63, 20, 30, 0.2),
    "a token more": (65, 47, 50, 0.2),
    "a token more than a pack": (129, 47, 50, 0.2),
    # several packs in each of several parts of tokens, the last of them cut
    "parts of tokens": (1100, 18, 35, 0.3),
    # columns in three blocks, the last of them narrow
    "blocks of columns": (70, 37, 1030, 0.03),
    "whole blocks": (128, 64, 1024, 0.1),
    # pieces of a row as long as they can be, and every length below
    "half dense": (33, 90, 300, 0.5),
    # outputs in more than one run of the rows that are added
    "many outputs": (35, 530, 40, 0.05),
    "nothing stored but one row": (9, 4, 19, 0.0),
}


@needs_library
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_product_with_the_dense_matrix(shape, dtype, strided):
    check(sparse(*SHAPES[shape], dtype=dtype, strided=strided), strided=strided)


@needs_library
def test_the_transposed_matrix_is_the_same_product():
    x = sparse(70, 40, 300, 0.1)
    row, column = x.mask.nonzero().T
    order = column.argsort(stable=True)
    starts, rows = index(x.mask.t())
    assert torch.equal(rows, row[order].int())
    turned = x._replace(input=x.grad, values=x.values[order], starts=starts, columns=rows)
    up, weight = x.grad.double(), x.dense
    close(added(turned, torch.zeros(70, 300)), up @ weight, up.abs() @ weight.abs())


@needs_library
def test_without_entries():
    x = sparse(6, 3, 5, 1.0)._replace(
        values=torch.zeros(0), starts=torch.zeros(4).int(), columns=torch.zeros(0).int()
    )
    start = torch.randn(6, 3)
    assert torch.equal(added(x, start.clone()), start)
    assert sampled(x).shape == (0,)


@needs_library
def test_only_stored_entries_are_read():
    x = sparse(40, 20, 30, 0.2)
    x.mask[:, 0] = False
    starts, columns = index(x.mask)
    x = x._replace(starts=starts, columns=columns, values=torch.randn(len(columns)))
    x.input[:, 0] = torch.nan
    assert added(x, torch.zeros(40, 20)).isfinite().all()
    assert sampled(x).isfinite().all()


@needs_library
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_shows_what_is_not_finite(value):
    x = sparse(65, 20, 30, 0.2)
    x.input[64, 7] = value
    hit = x.mask[:, 7]
    out = added(x, torch.zeros(65, 20))
    assert torch.equal(out.isfinite()[64], ~hit)
    assert out[:64].isfinite().all()
    assert torch.equal(sampled(x).isfinite(), x.columns != 7)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_does_not_depend_on_threads_or_the_run(dtype):
    x = sparse(1500, 50, 600, 0.1, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 5):
            torch.set_num_threads(count)
            results.append((added(x, torch.zeros(1500, 50, dtype=dtype)), sampled(x)))
    finally:
        torch.set_num_threads(threads)
    for out, samples in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(samples, results[0][1])


def changed(**change: Tensor) -> dict[str, Tensor]:
    """Arguments of both operators, of a matrix (2, 5) with the entries (0, 1), (0, 4), (1, 2)."""
    good = {
        "out": torch.zeros(3, 2),
        "input": torch.zeros(3, 5),
        "values": torch.zeros(3),
        "starts": torch.tensor([0, 2, 3]).int(),
        "columns": torch.tensor([1, 4, 2]).int(),
    }
    return {**good, **change}


def names(value: object) -> str:
    return "-".join(value) if isinstance(value, dict) else ""


def ints(*values: int) -> Tensor:
    return torch.tensor(values).int()


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(3, 5).double()}, "input must be float32 or bfloat16"),
        ({"out": torch.zeros(3, 2).bfloat16()}, "must have the dtype of input"),
        ({"out": torch.zeros(2, 3).t()}, "must be a matrix whose rows are contiguous"),
        ({"input": torch.zeros(5)}, "input must be a matrix"),
        ({"out": torch.zeros(4, 2)}, "has 4 rows, input has 3: expected the same tokens"),
        ({"starts": torch.tensor([0, 2, 3])}, "starts must be a contiguous vector of int32"),
        ({"columns": ints(1, 4, 2)[None]}, "columns must be a contiguous vector of int32"),
        ({"starts": ints(0, 3)}, r"starts has 2 entries, expected .* rows \(3\)"),
        ({"starts": ints(0, 2, 4)}, r"end with the number of columns \(3\), got 0 and 4"),
        ({"starts": ints(1, 2, 3)}, "starts must begin with 0"),
        ({"starts": ints(0, 4, 3)}, "starts must not decrease: 4 and then 3 at row 1"),
        ({"columns": ints(1, 5, 2)}, "columns of row 0 must ascend, .* 4; got 5 at entry 1"),
        ({"columns": ints(1, 4, -1)}, "columns of row 1 must ascend, .* got -1 at entry 2"),
    ],
    ids=names,
)
def test_checks_at_the_door(change, message):
    x = changed(**change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.apical.sparse_add_(*x.values())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.apical.sparse_sampled(x["out"], x["input"], x["starts"], x["columns"])


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(4)}, r"values must be .* one entry per column \(3\)"),
        ({"values": torch.zeros(3).bfloat16()}, "values must have the dtype of input"),
        ({"out": torch.zeros(1, 2).expand(3, 2)}, "out must not have rows that overlap"),
    ],
    ids=names,
)
def test_checks_what_is_only_added(change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.apical.sparse_add_(*changed(**change).values())


@needs_library
def test_columns_that_do_not_ascend_over_blocks_are_found():
    x = sparse(3, 2, 600, 0.0)
    x.columns[[10, 550]] = x.columns[[550, 10]]  # within a block any order is the same sum
    with pytest.raises(RuntimeError, match="columns of row 1 must ascend"):
        sampled(x)


def instruction_sets() -> list[str]:
    if not native.loaded():
        return []
    named = {"avx512": torch.cpu._is_avx512_supported, "avx2": torch.cpu._is_avx2_supported}
    return ["baseline", *(name for name, supported in named.items() if supported())]


# every set of loops that this processor can run, not only the best one
@pytest.mark.parametrize("isa", instruction_sets())
def test_every_instruction_set(isa):
    code = f"""
import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_sparse_rows as tests
assert torch.ops.apical.cpu_isa() == {isa!r}
torch.manual_seed(0)
for shape in tests.SHAPES.values():
    for dtype in (torch.float32, torch.bfloat16):
        tests.check(tests.sparse(*shape, dtype=dtype))
        tests.check(tests.sparse(*shape, dtype=dtype, strided=True), strided=True)
    tests.test_does_not_depend_on_threads_or_the_run(dtype)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "APICAL_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
