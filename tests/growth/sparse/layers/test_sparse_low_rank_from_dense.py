"""SLTrain's layer in place of a dense one: the projection, and what else is taken over."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from apical import SparseLowRankLinear

# ragged: no multiple of a vector, a block or each other
IN, OUT = 37, 52
SETTINGS: dict[str, Any] = {"rank": 5, "density": 0.1, "alpha": 8.0, "seed": 3}


def settings_of(**changes: Any) -> dict[str, Any]:
    return SETTINGS | changes


@pytest.mark.parametrize(
    "exact",
    [
        pytest.param({"rank": IN}, id="full rank"),
        pytest.param({"density": 1.0}, id="all entries stored"),
    ],
)
def test_projection_is_exact_where_it_can_be(exact: dict[str, Any]):
    linear = nn.Linear(IN, OUT, dtype=torch.float64)
    layer = SparseLowRankLinear.from_dense(linear, **settings_of(**exact))
    torch.testing.assert_close(layer.dense_weight(), linear.weight.data, rtol=0, atol=1e-14)
    assert layer.bias is not None
    assert torch.equal(layer.bias, linear.bias)


def test_projection_finds_a_low_rank_weight():
    linear = nn.Linear(IN, OUT, dtype=torch.float64)
    linear.weight.data = torch.randn(OUT, 5, dtype=torch.float64) @ torch.randn(5, IN).double()
    layer = SparseLowRankLinear.from_dense(linear, **SETTINGS)
    torch.testing.assert_close(layer.dense_weight(), linear.weight.data, rtol=0, atol=1e-12)


def test_projection_comes_near_the_best_and_its_factors_are_balanced():
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, dtype=torch.float64)
    layer = SparseLowRankLinear.from_dense(linear, **SETTINGS)
    mask = layer.support.mask()
    weight = linear.weight.data

    def svd(matrix: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return (u[:, :5] * s[:5]) @ v[:5]

    first = best = svd(weight)
    for _ in range(300):  # the alternation of SVDs, to its end
        best = svd(torch.where(mask, best, weight))
    errors = [(weight - near)[~mask].norm() for near in (first, layer.dense_weight(), best)]
    assert errors[1] < errors[2] + 0.3 * (errors[0] - errors[2])
    # stored entries are exact, whatever the low-rank part is there
    torch.testing.assert_close(layer.dense_weight()[mask], weight[mask], rtol=0, atol=1e-14)
    gram = layer.b.T @ layer.b
    torch.testing.assert_close(gram, layer.a @ layer.a.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-12)


def test_projection_in_bfloat16_stores_what_the_factors_lose():
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    layer = SparseLowRankLinear.from_dense(linear, **settings_of(density=1.0))
    # everywhere stored: the only error is that of the values, half a unit in the last place
    weight = layer.alpha / layer.rank * layer.b.double() @ layer.a.double()
    weight = weight.flatten().index_add(0, layer.support.flat(), layer.values.double())
    error = (weight.view(OUT, IN) - linear.weight.double()).abs().max()
    assert error < linear.weight.abs().max() * 2**-8


def test_sltrain_init_takes_nothing_but_the_shape():
    linear = nn.Linear(IN, OUT)
    linear.weight.data.fill_(torch.nan)
    torch.manual_seed(7)
    layer = SparseLowRankLinear.from_dense(linear, **SETTINGS, init="sltrain")
    torch.manual_seed(7)
    fresh = SparseLowRankLinear(IN, OUT, **SETTINGS)
    torch.testing.assert_close(layer.state_dict(), fresh.state_dict(), rtol=0, atol=0)


def test_projection_leaves_the_global_generator_alone():
    linear = nn.Linear(IN, OUT)
    before = torch.get_rng_state()
    SparseLowRankLinear.from_dense(linear, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)


def test_from_conv1d_is_from_its_transposed_weight():
    torch.manual_seed(0)
    conv = Conv1D(OUT, IN)
    layer = SparseLowRankLinear.from_dense(conv, **settings_of(rank=IN))
    x = torch.randn(4, IN)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)


def test_from_dense_keeps_mode_and_what_is_trained():
    linear = nn.Linear(IN, OUT).eval()
    linear.weight.requires_grad_(False)
    layer = SparseLowRankLinear.from_dense(linear, **SETTINGS)
    wanted = {"a": False, "b": False, "values": False, "bias": True}
    assert {name: p.requires_grad for name, p in layer.named_parameters()} == wanted
    assert not layer.training


def test_from_dense_refuses_what_it_cannot_come_near():
    linear = nn.Linear(IN, OUT)
    with pytest.raises(ValueError, match="init is 'zero'; expected 'project' or 'sltrain'"):
        SparseLowRankLinear.from_dense(linear, **SETTINGS, init="zero")  # pyright: ignore
    with pytest.raises(ValueError, match="linear is a Embedding; expected an"):
        SparseLowRankLinear.from_dense(nn.Embedding(4, 4), **SETTINGS)
    linear.weight.data[3, 4] = torch.inf
    with pytest.raises(ValueError, match="weight holds NaN or infinite entries"):
        SparseLowRankLinear.from_dense(linear, **SETTINGS)
    whole = nn.Linear(4, 4)
    whole.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight of torch\.int8; expected floating point"):
        SparseLowRankLinear.from_dense(whole, **SETTINGS)
