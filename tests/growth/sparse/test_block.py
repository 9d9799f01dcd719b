"""The block-diagonal layer."""

import copy
import json
import math
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import apical
from apical import Block, BlockLinear, sparsify

IN, OUT = 36, 60


@pytest.mark.parametrize("blocks", [1, 4, 12])  # dense, and as many as divide both
def test_projection_is_the_diagonal(blocks: int):
    linear = nn.Linear(IN, OUT, dtype=torch.float64)
    layer = BlockLinear.from_dense(linear, blocks=blocks)
    row, column = torch.arange(OUT)[:, None], torch.arange(IN)
    inside = row // (OUT // blocks) == column // (IN // blocks)
    assert torch.equal(layer.dense_weight(), linear.weight * inside)
    assert layer.flops(10) == 2 * 10 * int(inside.sum())


@pytest.mark.parametrize("bias", [True, False])
def test_output_is_that_of_the_dense_layer(bias: bool):
    layer = BlockLinear(IN, OUT, bias, blocks=3, dtype=torch.float64)
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(layer, (x,))
    assert layer(x[0, 0]).shape == (OUT,)
    assert layer(x[:0]).shape == (0, 5, OUT)


def test_gradient_is_the_diagonal_of_the_dense_one():
    layer = BlockLinear(IN, OUT, blocks=3, dtype=torch.float64)
    dense, x = layer.to_dense(), torch.randn(5, IN, dtype=torch.float64)
    for module in (layer, dense):
        module(x).square().sum().backward()
    assert layer.diagonal.grad is not None
    assert dense.weight.grad is not None
    for i, block in enumerate(layer.diagonal.grad):
        expected = dense.weight.grad[20 * i : 20 * i + 20, 12 * i : 12 * i + 12]
        torch.testing.assert_close(block, expected, rtol=1e-13, atol=1e-13)


def test_parts_do_not_mix():
    layer = BlockLinear(IN, OUT, blocks=3)
    x = torch.randn(4, IN)
    before = layer(x)
    x[:, 12:24] = torch.nan
    after = layer(x)
    assert after[:, 20:40].isnan().all()
    torch.testing.assert_close(after[:, :20], before[:, :20])
    torch.testing.assert_close(after[:, 40:], before[:, 40:])


def test_initial_values_are_those_of_small_layers():
    torch.manual_seed(0)
    layer = BlockLinear(400, 200, blocks=4)
    for parameter in layer.parameters():
        bound = 1 / math.sqrt(100)
        assert 0.95 * bound < parameter.abs().max() <= bound


def test_from_conv1d():
    conv = Conv1D(OUT, IN).eval()
    layer = BlockLinear.from_dense(conv, blocks=1)
    x = torch.randn(4, IN)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)
    assert not layer.training
    torch.manual_seed(1)
    drawn = BlockLinear.from_dense(conv, blocks=3, init="random")
    torch.manual_seed(1)
    torch.testing.assert_close(drawn.state_dict(), BlockLinear(IN, OUT, blocks=3).state_dict())


def test_half_precision():
    layer = BlockLinear(IN, OUT, dtype=torch.bfloat16)
    x = torch.randn(8, IN, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16


def test_saved_and_copied():
    layer = BlockLinear(IN, OUT, blocks=3)
    x = torch.randn(4, IN)
    other = BlockLinear(**json.loads(json.dumps(layer.settings())))
    other.load_state_dict(load(save(layer.state_dict())))
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(same(x), layer.to_dense()(x), rtol=1e-5, atol=1e-6)
    assert repr(layer) == "BlockLinear(in_features=36, out_features=60, bias=True, blocks=3)"


def test_a_converted_model_is_saved_and_loaded(tmp_path: Any):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    model = sparsify(LlamaForCausalLM(config), Block(blocks=4)).eval()
    model.save_pretrained(tmp_path)
    tokens = torch.arange(12)[None]
    assert torch.equal(apical.load(tmp_path).eval()(tokens).logits, model(tokens).logits)


def test_on_meta():
    linear = nn.Linear(IN, OUT, device="meta", dtype=torch.float16)
    layer = BlockLinear.from_dense(linear)
    assert {(p.is_meta, p.dtype) for p in layer.parameters()} == {(True, torch.float16)}
    assert layer.to_dense().weight.shape == (OUT, IN)
    assert layer.to_dense().weight.is_meta


def test_arguments_are_refused():
    with pytest.raises(ValueError, match=r"blocks is 5, which does not divide both .*: 4 and 6$"):
        BlockLinear(IN, OUT, blocks=5)
    linear = nn.Linear(IN, OUT)
    with pytest.raises(ValueError, match="init is 'svd'; expected 'project' or 'random'"):
        BlockLinear.from_dense(linear, init="svd")  # pyright: ignore
    # by hand it has no name, and no rule to exclude it from
    with pytest.raises(
        NotImplementedError, match=r"^a BlockLinear has no .* Leave the layer dense"
    ):
        nn.init.zeros_(BlockLinear(IN, OUT).weight)
    linear.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight holds NaN or infinite entries"):
        BlockLinear.from_dense(linear)
