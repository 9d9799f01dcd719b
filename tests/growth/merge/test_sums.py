"""The sum of tensors, against float64."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import apical
from apical.growth.merge.sums import combine

# one rounding of the result
_EPS = {
    t: torch.finfo(t).eps for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


def _combined(tensors, coefficients):
    return combine([lambda t=t: t for t in tensors], coefficients)


def _truth(tensors, coefficients):
    terms = [c * t.double() for t, c in zip(tensors, coefficients, strict=True)]
    return torch.stack(terms).sum(0)


@pytest.mark.parametrize("dtype", _EPS, ids=str)
@pytest.mark.parametrize(
    "method",
    [
        apical.Average(),
        apical.Average([3.0, 1.0, 2.0]),
        apical.EMA(0.7),
        apical.Linear([0.5, -2.0, 0.25]),  # sums to -1.25
        apical.Linear([1.0, -1.0, 0.0]),  # a difference, sums to 0
        apical.TaskVectors(0.4),
        apical.TaskVectors(scales=[-1.0, 0.5]),  # negation
        apical.Posterior([-2.0, -1.0, -1.5]),
    ],
    ids=str,
)
def test_every_method_is_its_formula(method, dtype):
    tensors = [torch.randn(33, 7, dtype=torch.float64).to(dtype) for _ in range(3)]
    coefficients = method.coefficients(3)
    merged = _combined(tensors, coefficients)
    assert merged.dtype == dtype
    size = sum(abs(c) * t.double().abs() for t, c in zip(tensors, coefficients, strict=True))
    # the result is rounded once, and what is summed in at most a few operations of 2 sizes each
    inner = _EPS[dtype if dtype == torch.float64 else torch.float32]
    truth = _truth(tensors, coefficients)
    bound = _EPS[dtype] / 2 * truth.abs() + 12 * inner * (size + tensors[0].double().abs())
    assert ((merged.double() - truth).abs() <= bound).all()


@given(st.permutations(range(4)))
def test_an_average_does_not_depend_on_the_order(order):
    tensors = [torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    one = _combined(tensors, [0.25] * 4)
    other = _combined([tensors[i] for i in order], [0.25] * 4)
    assert (one - other).abs().max() <= 8 * _EPS[torch.float32] * torch.stack(tensors).abs().max()


@pytest.mark.parametrize("dtype", _EPS, ids=str)
@pytest.mark.parametrize("count", [2, 3, 7], ids=lambda n: f"{n}: shares that round")
@pytest.mark.parametrize(
    "method", [apical.Average(), apical.EMA(0.9), apical.TaskVectors(0.3)], ids=str
)
def test_equal_models_are_what_they_merge_to(method, count, dtype):
    tensor = torch.randn(1000).to(dtype)
    assert torch.equal(_combined([tensor] * count, method.coefficients(count)), tensor)


def test_one_model_is_copied_bit_for_bit():
    bits = torch.tensor([0x7FC12345, -(2**31), 1], dtype=torch.int32)  # NaN's payload, -0, denormal
    tensor = bits.view(torch.float32)
    for method in (
        apical.Average(),
        apical.EMA(0.5),
        apical.Linear([1.0]),
        apical.TaskVectors(3.0),
    ):
        merged = _combined([tensor], method.coefficients(1))
        assert torch.equal(merged.view(torch.int32), bits)
        assert merged.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("where", [0, 1], ids=["first", "second"])
def test_a_model_with_coefficient_0_says_nothing(where):
    broken, good = torch.full((3,), torch.nan), torch.randn(3).bfloat16()
    tensors = [good, good * 2]
    tensors.insert(where, broken)
    coefficients = [0.25, 0.75]
    coefficients.insert(where, 0.0)
    merged = _combined(tensors, coefficients)
    assert merged.dtype == tensors[0].dtype
    torch.testing.assert_close(merged, (1.75 * good.float()).to(merged.dtype))


def test_nothing_of_all_is_zero():
    assert _combined([torch.ones(2), torch.ones(2)], [0.0, 0.0]).tolist() == [0, 0]


@pytest.mark.parametrize(
    "dtypes",
    list(itertools.permutations([torch.bfloat16, torch.float32, torch.float64])),
    ids=lambda dtypes: "-".join(str(t).removeprefix("torch.") for t in dtypes),
)
def test_the_dtype_is_that_of_the_first_and_sums_are_in_float64_if_one_is(dtypes):
    tensors = [torch.randn(100, dtype=torch.float64).to(dtype) for dtype in dtypes]
    coefficients = apical.Average().coefficients(3)
    merged, truth = _combined(tensors, coefficients), _truth(tensors, coefficients)
    assert merged.dtype == dtypes[0]
    error = (merged.double() - truth).abs().max()
    # a float32 tensor is the first operand of the sum before the float64 one is seen
    assert error <= max(_EPS[dtypes[0]], _EPS[torch.float32]) * 4


def test_the_tensors_stay_as_they_are():
    tensors = [torch.randn(5) for _ in range(3)]
    before = [tensor.clone() for tensor in tensors]
    _combined(tensors, [0.2, 0.3, 0.4])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
