"""The Monarch layer: the best projection, rectangular and of any rank, and back to dense."""

import copy
import json
import math
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import apical
from apical import Monarch, MonarchLinear, sparsify
from apical.growth.sparse import replaced

IN, OUT = 36, 60


def brute_force(weight: Tensor, blocks: int, rank: int) -> Tensor:
    """Return the nearest matrix, each part by an SVD of its own."""
    run = weight.shape[1] // blocks
    nearest = torch.zeros_like(weight)
    for k, r in product(range(blocks), range(blocks)):
        part = weight[k::blocks, r * run : (r + 1) * run]
        left, values, right = torch.linalg.svd(part, full_matrices=False)
        near = left[:, :rank] @ values[:rank].diag() @ right[:rank]
        nearest[k::blocks, r * run : (r + 1) * run] = near
    return nearest


@pytest.mark.parametrize(
    ("shape", "blocks", "rank"),
    [
        ((IN, OUT), 4, 1),  # more outputs than inputs
        ((OUT, IN), 4, 3),  # fewer
        ((64, 64), 8, 1),  # square, the theory's sizes
        ((IN, OUT), 1, 5),  # one part: low rank
        ((IN, OUT), 3, 12),  # full rank of every part: nothing is lost
    ],
)
def test_projection_is_the_svd_of_every_part(shape: tuple[int, int], blocks: int, rank: int):
    torch.manual_seed(0)
    linear = nn.Linear(*shape, dtype=torch.float64)
    layer = MonarchLinear.from_dense(linear, blocks=blocks, rank=rank)
    weight = linear.weight.detach()
    nearest = brute_force(weight, blocks, rank)
    torch.testing.assert_close(layer.dense_weight(), nearest, rtol=0, atol=1e-12)
    error, best = (layer.dense_weight() - weight).norm(), (nearest - weight).norm()
    assert abs(error - best) <= 1e-6 * max(best, 1e-6)
    single = MonarchLinear.from_dense(linear.float(), blocks=blocks, rank=rank)
    error = (single.dense_weight().double() - weight).norm()
    assert abs(error - best) <= 1e-6 * weight.norm()
    assert single.bias is not None
    assert torch.equal(single.bias, linear.bias)


def test_a_monarch_matrix_is_projected_onto_itself():
    layer = MonarchLinear(IN, OUT, blocks=3, rank=2, dtype=torch.float64)
    again = MonarchLinear.from_dense(layer.to_dense(), blocks=3, rank=2)
    torch.testing.assert_close(again.dense_weight(), layer.dense_weight(), rtol=0, atol=1e-13)
    # both factors share the singular values
    norms = [factor.norm() for factor in (again.first, again.second)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_output_is_that_of_the_dense_layer(bias: bool, dtype: torch.dtype):
    layer = MonarchLinear(IN, OUT, bias, blocks=3, rank=2, dtype=dtype)
    x = torch.randn(2, 5, IN, dtype=dtype)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=tolerance, atol=tolerance)
    assert layer(x[:0]).shape == (0, 5, OUT)


def test_gradients():
    layer = MonarchLinear(6, 4, blocks=2, rank=1, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert layer.bias is not None
    leaves = (x, layer.first, layer.second, layer.bias)

    def call(x: Tensor, *parameters: Tensor) -> Any:
        first, second, bias = parameters
        named = {"first": first, "second": second, "bias": bias}
        return torch.func.functional_call(layer, named, (x,))

    assert torch.autograd.gradcheck(call, leaves)


def test_training_goes_on_densely():
    # reverse sparsification: the dense layer begins where the Monarch one is
    torch.manual_seed(0)
    layer, x, y = MonarchLinear(IN, OUT, blocks=4), torch.randn(64, IN), torch.randn(64, OUT)

    def train(module: nn.Module, count: int) -> float:
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        losses = []
        for _ in range(count):
            optimizer.zero_grad()
            loss = (module(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0] - losses[-1]

    assert train(layer, 20) > 0
    dense = layer.to_dense()
    torch.testing.assert_close(dense(x), layer(x), rtol=1e-5, atol=1e-5)
    assert train(dense, 20) > 0
    assert dense.weight.grad is not None
    assert dense.weight.grad.all()


@pytest.mark.parametrize(
    ("shape", "blocks", "rank"),
    [
        ((2048, 2048), 4, 128),  # fly's: 4 blocks of 512 x 512 twice
        ((1024, 1024), 32, 1),  # rank 1 at blocks = sqrt(n)
        ((768, 3072), 4, 48),  # the smaller side
        ((8, 8), 8, 1),  # a share below 1
    ],
)
def test_rank_by_default(shape: tuple[int, int], blocks: int, rank: int):
    layer = MonarchLinear(*shape, blocks=blocks, device="meta")
    assert layer.rank == rank
    if shape[0] == shape[1] and rank * blocks**2 == shape[0]:
        assert layer.flops(7) == 2 * 7 * shape[0] ** 2 * 2 // blocks


def test_flops_are_those_of_both_factors():
    layer = MonarchLinear(IN, OUT, blocks=3, rank=2)
    assert layer.flops(100) == 2 * 100 * (layer.first.numel() + layer.second.numel())


def test_initial_values_are_within_the_fan_in_of_each_factor():
    torch.manual_seed(0)
    layer = MonarchLinear(400, 200, blocks=4, rank=10)
    assert layer.bias is not None
    for values, fan_in in ((layer.first, 100), (layer.second, 40), (layer.bias, 200)):
        bound = 1 / math.sqrt(fan_in)
        assert 0.95 * bound < values.abs().max() <= bound
        # uniform: variance bound^2 / 3
        few = 5 * bound**2 / math.sqrt(values.numel())
        assert abs(values.var() - bound**2 / 3) < few
    torch.manual_seed(0)
    again = MonarchLinear.from_dense(nn.Linear(400, 200), blocks=4, rank=10, init="random")
    torch.manual_seed(0)
    nn.Linear(400, 200)  # what the line above drew first
    fresh = MonarchLinear(400, 200, blocks=4, rank=10)
    torch.testing.assert_close(again.state_dict(), fresh.state_dict(), rtol=0, atol=0)


def test_from_conv1d_at_full_rank_is_the_same_function():
    conv = Conv1D(OUT, IN).eval()
    layer = MonarchLinear.from_dense(conv, blocks=4, rank=9)
    x = torch.randn(4, IN)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)
    assert not layer.training


def test_half_precision():
    linear = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    layer = MonarchLinear.from_dense(linear, blocks=4, rank=9)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    exact = layer.double().dense_weight()
    layer = layer.bfloat16()
    # factors are bfloat16 already: the product is rounded once
    assert torch.equal(layer.dense_weight(), exact.bfloat16())
    x = torch.randn(8, IN, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert MonarchLinear(IN, OUT)(torch.randn(3, IN)).dtype == torch.bfloat16


def test_saved_and_copied():
    layer = MonarchLinear(IN, OUT, blocks=3, rank=2)
    x = torch.randn(4, IN)
    other = MonarchLinear(**json.loads(json.dumps(layer.settings())))
    other.load_state_dict(load(save(layer.state_dict())))
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(same(x), layer.to_dense()(x), rtol=1e-5, atol=1e-6)
    assert repr(layer) == (
        "MonarchLinear(in_features=36, out_features=60, bias=True, blocks=3, rank=2)"
    )


def test_a_converted_model_is_saved_and_loaded(tmp_path: Any):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    model = sparsify(LlamaForCausalLM(config), Monarch(blocks=4)).eval()
    assert len(replaced(model)) == 14
    model.save_pretrained(tmp_path)
    tokens = torch.arange(12)[None]
    assert torch.equal(apical.load(tmp_path).eval()(tokens).logits, model(tokens).logits)


def test_on_meta():
    linear = nn.Linear(IN, OUT, device="meta", dtype=torch.float16)
    layer = MonarchLinear.from_dense(linear)
    assert {(p.is_meta, p.dtype) for p in layer.parameters()} == {(True, torch.float16)}
    assert layer.to_dense().weight.shape == (OUT, IN)
    assert layer.to_dense().weight.is_meta


# dynamo makes an instance of every torch.autograd.Function, which torch warns of
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_in_one_graph():
    layer = MonarchLinear(IN, OUT, blocks=3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, IN)
    results = []
    for module in (layer, compiled):
        out = module(x)
        results.append((out, torch.autograd.grad(out.sum(), [layer.first, layer.second])))
    torch.testing.assert_close(*results)


def test_arguments_are_refused():
    for blocks, nearest in ((5, "4 and 6"), (7, "6 and 12"), (13, "12"), (24, "12")):
        with pytest.raises(ValueError, match=f"does not divide both .* that do: {nearest}$"):
            MonarchLinear(IN, OUT, blocks=blocks)
    for blocks in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"blocks is .*; expected an integer of at least 1"):
            MonarchLinear(IN, OUT, blocks=blocks)  # pyright: ignore
    for rank in (0, 10, 1.5):
        with pytest.raises(ValueError, match=r"rank is .*; expected an integer in 1 \.\. 9"):
            MonarchLinear(IN, OUT, blocks=4, rank=rank)  # pyright: ignore
    linear = nn.Linear(IN, OUT)
    with pytest.raises(ValueError, match="init is 'svd'; expected 'project' or 'random'"):
        MonarchLinear.from_dense(linear, init="svd")  # pyright: ignore
    linear.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="weight holds NaN or infinite entries"):
        MonarchLinear.from_dense(linear)
