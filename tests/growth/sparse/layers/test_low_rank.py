"""The low-rank layer: PELA's rank and projection, CoLA's activation and initial values."""

import copy
import json
import math
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from apical import LowRankLinear

IN, OUT = 37, 52  # ragged


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_the_definition(activation: Any, bias: bool):
    layer = LowRankLinear(IN, OUT, bias, rank=5, activation=activation, dtype=torch.float64)
    x = torch.randn(3, 4, IN, dtype=torch.float64, requires_grad=True)
    hidden = x @ layer.a.T
    hidden = hidden * hidden.sigmoid() if activation else hidden
    expected = hidden @ layer.b.T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((768, 768), 128),  # 768 / 6
        ((768, 3072), 204),  # floor of 204.8
        ((2, 3), 1),  # floor would be 0
    ],
)
def test_pelas_rank(shape: tuple[int, int], rank: int):
    assert LowRankLinear(*shape, device="meta").rank == rank


def test_initial_values_are_colas():
    torch.manual_seed(0)
    layer = LowRankLinear(400, 300, rank=80, activation="silu")
    assert layer.bias is not None
    for values in (layer.a, layer.b):
        # 5 standard errors of a normal variance and mean
        variance = 80**-0.5 * 700**-0.5
        assert abs(values.var() / variance - 1) < 5 * math.sqrt(2 / values.numel())
        assert abs(values.mean()) < 5 * math.sqrt(variance / values.numel())
    assert 0.9 / math.sqrt(300) < layer.bias.abs().max() <= 1 / math.sqrt(300)
    torch.manual_seed(0)
    again = LowRankLinear(400, 300, rank=80)
    torch.testing.assert_close(layer.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_projection_has_the_error_of_the_values_left_out():
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, dtype=torch.float64)
    layer = LowRankLinear.from_dense(linear, rank=6)
    error = (layer.dense_weight() - linear.weight).norm()
    best = torch.linalg.svdvals(linear.weight)[6:].norm()  # Eckart and Young
    torch.testing.assert_close(error, best, rtol=1e-12, atol=0)
    values = torch.linalg.svdvals(linear.weight)[:6].diag()
    torch.testing.assert_close(layer.a @ layer.a.T, values, rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.b.T @ layer.b, values, rtol=0, atol=1e-13)
    assert torch.equal(layer.state_dict()["bias"], linear.bias)


def test_from_conv1d_at_full_rank_is_the_same_function():
    conv = Conv1D(OUT, IN).eval()
    layer = LowRankLinear.from_dense(conv, rank=IN)
    x = torch.randn(4, IN)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)
    assert not layer.training


def test_cola_init_draws_everything():
    linear = nn.Linear(IN, OUT)
    linear.weight.data.fill_(torch.nan)
    torch.manual_seed(3)
    layer = LowRankLinear.from_dense(linear, rank=6, activation="silu", init="cola")
    torch.manual_seed(3)
    fresh = LowRankLinear(IN, OUT, rank=6, activation="silu")
    torch.testing.assert_close(layer.state_dict(), fresh.state_dict(), rtol=0, atol=0)
    assert layer.activation == "silu"


def test_to_dense_is_the_same_function():
    layer = LowRankLinear(IN, OUT, rank=6)
    x = torch.randn(4, IN)
    linear = layer.to_dense()
    assert type(linear) is nn.Linear
    torch.testing.assert_close(linear(x), layer(x), rtol=1e-5, atol=1e-6)
    low = layer.bfloat16().to_dense().weight
    assert low.dtype == torch.bfloat16
    exact = (layer.b.double() @ layer.a.double()).bfloat16()
    assert torch.equal(low, exact)  # rounded once


def test_saved_and_copied():
    layer = LowRankLinear(IN, OUT, rank=6, activation="silu")
    x = torch.randn(4, IN)
    other = LowRankLinear(**json.loads(json.dumps(layer.settings())))
    other.load_state_dict(load(save(layer.state_dict())))
    hidden = functional.silu(functional.linear(x, layer.a))
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), functional.linear(hidden, layer.b, layer.bias))
    assert repr(layer) == (
        "LowRankLinear(in_features=37, out_features=52, bias=True, rank=6, activation=silu)"
    )


def test_on_meta():
    layer = LowRankLinear.from_dense(nn.Linear(IN, OUT, device="meta", dtype=torch.float16), rank=2)
    assert {(p.is_meta, p.dtype) for p in layer.parameters()} == {(True, torch.float16)}
    assert layer.to_dense().weight.is_meta


def test_flops_are_those_of_two_products():
    assert LowRankLinear(IN, OUT, rank=6).flops(100) == 2 * 100 * 6 * (IN + OUT)


def test_arguments_are_refused():
    with pytest.raises(ValueError, match="activation is 'relu'; expected None or 'silu'"):
        LowRankLinear(IN, OUT, rank=6, activation="relu")  # pyright: ignore
    with pytest.raises(ValueError, match=r"rank is 38; expected an integer in 1 \.\. 37"):
        LowRankLinear(IN, OUT, rank=38)
    linear = nn.Linear(IN, OUT)
    with pytest.raises(ValueError, match="init is 'pca'; expected 'svd' or 'cola'"):
        LowRankLinear.from_dense(linear, init="pca")  # pyright: ignore
    with pytest.raises(ValueError, match="is near no given matrix; pass init='cola'"):
        LowRankLinear.from_dense(linear, activation="silu")
    linear.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight holds NaN or infinite entries"):
        LowRankLinear.from_dense(linear)
    layer = LowRankLinear(IN, OUT, rank=6, activation="silu")
    with pytest.raises(ValueError, match=r"has activation='silu' .* has no dense weight"):
        layer.to_dense()
