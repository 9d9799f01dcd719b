"""Products with a matrix of blocks of the C++ library, on every instruction set."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from apical.kernels._common import native
from apical.kernels.sparse_low_rank.support import Support

needs_library = pytest.mark.skipif(not native.loaded(), reason=native.status()[1])


class Case(NamedTuple):
    """Operands; rows of the matrices may be further apart than they are long."""

    input: Tensor  # (T, m)
    grad: Tensor  # (T, n)
    out: Tensor  # (T, n), what is there before
    of_input: Tensor  # (T, m), the same
    values: Tensor  # (S,)
    held: tuple[Tensor, ...]  # of GroupIndex
    block: tuple[int, int]


MATRICES = Case._fields[:5]


class Results(NamedTuple):
    out: Tensor
    of_input: Tensor
    of_values: Tensor


def case(
    T: int, n: int, m: int, block: tuple[int, int] = (128, 16), density: float = 0.1, apart: int = 0
) -> tuple[Case, Support]:
    support = Support("grouped", n, m, density, block=block)
    wide, narrow = torch.randn(2, T, n + apart), torch.randn(2, T, m + apart)
    rows = (narrow[0, :, :m], wide[0, :, :n], wide[1, :, :n], narrow[1, :, :m])
    return Case(*rows, torch.randn(support.stored), support.index("cpu"), block), support


def products(x: Case) -> Results:
    """Return all three; what is added to is kept as it was, with its strides."""
    out, of_input = (t.as_strided_(t.shape, t.stride()) for t in map(copied, (x.out, x.of_input)))
    torch.ops.apical.blocks_add_(out, x.input, x.values, *x.held[:2], *x.block)
    torch.ops.apical.blocks_add_transposed_(of_input, x.grad, x.values, *x.held[:2], *x.block)
    of_values = torch.ops.apical.blocks_sampled(x.grad, x.input, *x.held[:2], *x.block)
    return Results(out, of_input, of_values)


def copied(rows: Tensor) -> Tensor:
    copy = torch.empty_strided(rows.shape, rows.stride(), dtype=rows.dtype)
    return copy.copy_(rows)


def truth(x: Case, support: Support) -> tuple[Results, Results]:
    """Return the results, and the sums of the sizes of their terms."""
    dense = torch.zeros(support.out_features, support.in_features, dtype=torch.float64)
    dense.view(-1)[support.flat()] = x.values.double()
    parts = [t.double() for t in (dense, x.input, x.grad, x.out, x.of_input)]
    return _results(parts, support), _results([t.abs() for t in parts], support)


def _results(parts: list[Tensor], support: Support) -> Results:
    w, x, grad, out, of_input = parts
    of_values = (grad.T @ x).flatten()[support.flat()]
    return Results(out + x @ w.T, of_input + grad @ w, of_values)


def assert_close(actual: Results, exact: tuple[Results, Results]) -> None:
    # roundings of float32 sums of at most 400 terms, of random sign
    for name, found, value, size in zip(Results._fields, actual, *exact, strict=True):
        assert found.isfinite().all(), name
        error = (found.double() - value).abs()
        assert (error <= 1e-6 * size).all(), (name, (error / size).max())


def instruction_sets() -> list[str]:
    if not native.loaded():
        return []
    named = {"avx512": torch.cpu._is_avx512_supported, "avx2": torch.cpu._is_avx2_supported}
    return ["baseline", *(name for name, supported in named.items() if supported())]


SIZES = [
    # tokens: one, and around the 12 and 48 that pass together
    *((T, 256, 64) for T in (1, 11, 12, 13, 63, 65, 97)),
    # the last group has one row, all but one, less than a vector and more
    *((49, n, 70) for n in (129, 255, 133, 145)),
    # less than one group, and than a vector; the last 3 and 15 columns are in no block
    (20, 100, 35),
    (20, 3, 31),
]
BLOCKS = [
    (8, 1),
    (100, 7),
    (1, 1),
    (1, 20),
    # more than one panel of vectors either way
    (300, 70),
    # whole vectors of some instruction sets only
    (24, 12),
]


@functools.cache
def cases_and_truths() -> list[tuple[Case, tuple[Results, Results]]]:
    torch.manual_seed(0)
    # dense enough for several blocks of one group in a column of blocks, or all
    made = [case(*size, density=d) for size in SIZES for d in (0.3, 1.0)]
    made += [case(50, 310, 150, block, density=0.3, apart=5) for block in BLOCKS]
    # most columns of blocks are in no group, and some groups have no block
    made.append(case(50, 1000, 320, density=0.02))
    return [(x, truth(x, support)) for x, support in made]


def on(isa: str, cases: list[Case], folder: Path) -> list[Results]:
    torch.save([(*x[:5], tuple(x.held), x.block) for x in cases], folder / "in")
    code = f"""
import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_sparse_blocks import Case, products
from apical.kernels._common import native
assert native.loaded() and torch.ops.apical.cpu_isa() == {isa!r}
cases = torch.load({str(folder / "in")!r})
torch.save([tuple(products(Case(*x))) for x in cases], {str(folder / "out")!r})
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "APICAL_ISA": isa}, check=True)
    return [Results(*found) for found in torch.load(folder / "out")]


# every set that this processor can run, not only the best one
@pytest.mark.parametrize("isa", instruction_sets())
def test_every_shape_on_every_instruction_set(isa, tmp_path):
    cases, truths = zip(*cases_and_truths(), strict=True)
    for actual, exact in zip(on(isa, list(cases), tmp_path), truths, strict=True):
        assert_close(actual, exact)


@pytest.mark.parametrize("isa", instruction_sets())
def test_bfloat16_is_summed_in_float32_and_rounded_once(isa, tmp_path):
    made = [half(x) for x, _ in cases_and_truths()]
    wide = [x._replace(**{name: getattr(x, name).float() for name in MATRICES}) for x in made]
    for few, digits in zip(on(isa, made, tmp_path), on(isa, wide, tmp_path), strict=True):
        assert all(torch.equal(x, y.bfloat16()) for x, y in zip(few, digits, strict=True))


def half(x: Case) -> Case:
    return x._replace(**{name: copied(getattr(x, name).bfloat16()) for name in MATRICES})


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(threads, dtype):
    torch.manual_seed(0)
    # groups for two tasks, and tokens that two threads share unevenly
    x, _ = case(403, 700, 512)
    x = half(x) if dtype == torch.bfloat16 else x
    before, first = torch.get_num_threads(), products(x)
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            assert all(map(torch.equal, products(x), first))
    finally:
        torch.set_num_threads(before)


@needs_library
def test_groups_with_more_sums_than_are_kept_at_once():
    torch.manual_seed(0)
    # 2 ** 17 values: two batches of groups
    x, support = case(70, 1024, 256, density=0.5)
    assert_close(products(x), truth(x, support))


@needs_library
def test_without_tokens():
    x, support = case(0, 256, 64)
    out, of_input, of_values = products(x)
    assert out.shape == (0, 256)
    assert of_input.shape == (0, 64)
    assert torch.equal(of_values, torch.zeros(support.stored))


@needs_library
def test_rows_between_those_of_a_view_are_left_alone():
    torch.manual_seed(0)
    x, _ = case(20, 130, 40)
    wide = torch.full((20, 150), 7.0)
    wide[:, 5:135] = x.out
    torch.ops.apical.blocks_add_(wide[:, 5:135], x.input, x.values, *x.held[:2], *x.block)
    assert torch.equal(wide[:, 5:135], products(x).out)
    assert (wide[:, :5] == 7).all()
    assert (wide[:, 135:] == 7).all()


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"values": x.values[1:]}, "values must be a contiguous vector of"),
        (lambda x: {"values": x.values.bfloat16()}, "values must be of the dtype of input"),
        (lambda x: {"input": x.input[1:]}, "out has 5 tokens and input 4"),
        (lambda x: {"input": x.input.double()}, "input must be float32 or bfloat16"),
        (lambda x: {"input": x.input.t().contiguous().t()}, "input must be a .* matrix"),
        (lambda x: {"block": (128, 0)}, "a block must have at least 1 x 1 entries"),
        (lambda x: {"block": (64, 16)}, "group_starts must have 5 entries"),
        (lambda x: {"held": (x.held[0].long(), *x.held[1:])}, "group_starts must be a .* int32"),
        (lambda x: {"held": (x.held[0].flip(0), *x.held[1:])}, r"group_starts\[1\] is"),
        (lambda x: {"held": (x.held[0], x.held[1] + 9, *x.held[2:])}, r"chunks\[\d\] is"),
        (lambda x: {"held": (x.held[0], x.held[1][1:], *x.held[2:])}, "must go from 0 to"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    x, _ = case(5, 256, 96, density=0.5)
    x = x._replace(**change(x))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.apical.blocks_add_(x.out, x.input, x.values, *x.held[:2], *x.block)


@needs_library
def test_what_does_not_fit_the_other_two_is_named():
    x, _ = case(5, 256, 96)
    args = (*x.held[:2], *x.block)
    with pytest.raises(RuntimeError, match="values must be of the dtype of grad"):
        torch.ops.apical.blocks_add_transposed_(x.of_input, x.grad, x.values.bfloat16(), *args)
    with pytest.raises(RuntimeError, match="input must be of the dtype of grad"):
        torch.ops.apical.blocks_sampled(x.grad, x.input.bfloat16(), *x.held[:2], *x.block)
