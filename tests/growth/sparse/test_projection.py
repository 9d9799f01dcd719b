"""Alternating projection: no round makes it worse."""

import pytest
import torch

from apical import Support
from apical.growth.sparse import _projection as projection


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])  # wide, tall
def test_every_round_comes_nearer(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    support = Support("uniform", *shape, density=0.1)
    outside, flat = ~support.mask(), support.flat()
    errors = []
    for rounds in range(12):
        monkeypatch.setattr(projection, "_ROUNDS", rounds)
        left, right = projection.beside_sparse(weight, flat, 8)
        errors.append((weight - left @ right)[outside].norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.02 * errors[-1]  # it is no accident: the first is the SVD's


def test_rounds_lead_to_the_best_where_that_is_known(monkeypatch: pytest.MonkeyPatch):
    # rank 1, one entry free: it is determined by the others
    monkeypatch.setattr(projection, "_ROUNDS", 100)
    whole = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0, 2.0])).double()
    spoiled = whole.clone()
    spoiled[1, 2] = 5
    left, right = projection.beside_sparse(spoiled, torch.tensor([5]), 1)
    torch.testing.assert_close(left @ right, whole, rtol=0, atol=1e-10)


def test_the_weight_is_left_as_it_was():
    weight = torch.randn(5, 7)
    before = weight.clone()
    projection.beside_sparse(weight, torch.tensor([3]), 2)
    projection.low_rank(weight, 2)
    assert torch.equal(weight, before)
