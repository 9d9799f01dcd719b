"""The masked layer: exact zeros through training, masks of every kind, N:M."""

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import apical
from apical import Masked, MaskedLinear, Support, sparsify
from apical.growth.sparse import replaced
from apical.growth.sparse.layers._bits import pack, packed_size, unpack

IN, OUT = 37, 52  # n m is no multiple of 8


def a_mask(share: float = 0.4, shape: tuple[int, int] = (OUT, IN)) -> Tensor:
    return torch.rand(shape) < share


@pytest.mark.parametrize("entries", [1, 7, 8, 9, 1000])  # ends of a byte
def test_masks_take_a_bit_an_entry(entries: int):
    mask = torch.rand(1, entries) < 0.5
    packed = pack(mask)
    assert (packed.dtype, packed.numel()) == (torch.uint8, -(-entries // 8))
    assert packed.numel() == packed_size(entries)
    assert torch.equal(unpack(packed, mask.shape), mask)
    bits = sum(1 << i for i in range(min(entries, 8)) if mask[0, i])
    assert int(packed[0]) == bits


@pytest.mark.parametrize("bias", [True, False])
def test_output_is_the_definition(bias: bool):
    layer = MaskedLinear(IN, OUT, bias, sparsity=0.75, dtype=torch.float64)
    x = torch.randn(3, 4, IN, dtype=torch.float64, requires_grad=True)
    expected = x @ (layer.weight * layer.dense_mask()).T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(layer, (x,))
    assert layer(x[:0]).shape == (0, 4, OUT)


def test_what_is_masked_has_no_say_even_where_it_is_not_finite():
    layer = MaskedLinear(IN, OUT, sparsity=0.5)
    x = torch.randn(4, IN)
    before = layer(x)
    layer.weight.data[~layer.dense_mask()] = torch.nan
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.to_dense()(x), before)
    x[1] = torch.nan
    assert layer(x)[1].isnan().all()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("uniform", {"sparsity": 0.75}),
        ("uniform", {"sparsity": 0.0}),
        ("regular", {"sparsity": 0.9}),
        ("grouped", {"sparsity": 0.5, "block": (8, 4)}),
        ("nm", {}),
        ("nm", {"sparsity": 0.75, "block": (1, 4)}),
    ],
)
def test_random_masks_are_those_of_the_support(kind: Any, options: dict[str, Any]):
    layer = MaskedLinear(40, OUT, support=kind, seed=5, **options)
    share = {"nm": 0.5} | {kind: options.get("sparsity", 0.5)}
    block = options.get("block", (0, 0))
    support = Support(kind, OUT, 40, round(1 - share[kind], 12), 5, block=block)
    assert torch.equal(layer.dense_mask(), support.mask())
    assert layer.stored == support.stored
    assert layer.sparsity == pytest.approx(share[kind])
    assert not layer.weight[~layer.dense_mask()].any()
    assert layer.weight[layer.dense_mask()].all()


def test_a_tenth_is_a_tenth():
    # 1 - 0.9 is less in floating point
    assert MaskedLinear(100, 100, sparsity=0.9).stored == 1000


def test_initial_values_are_those_of_nn_linear():
    torch.manual_seed(0)
    layer = MaskedLinear(IN, OUT, sparsity=0.5, seed=1)
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    assert torch.equal(layer.weight, linear.weight * layer.dense_mask())
    assert layer.bias is not None
    assert torch.equal(layer.bias, linear.bias)
    mask = layer.dense_mask()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, linear.weight * mask)
    assert torch.equal(layer.dense_mask(), mask)


def steps(layer: MaskedLinear, optimizer: torch.optim.Optimizer, count: int = 4) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        layer(torch.randn(8, IN)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_masked_entries_stay_exactly_zero_with_weight_decay(make: Any):
    layer = MaskedLinear(IN, OUT, sparsity=0.75)
    mask, before = layer.dense_mask(), layer.weight.detach().clone()
    steps(layer, make(layer.parameters(), lr=0.01, weight_decay=0.1))
    grad = layer.weight.grad
    assert grad is not None
    assert torch.equal(layer.weight[~mask], torch.zeros(int((~mask).sum())))
    assert not grad[~mask].any()
    # what is stored learns, all of it
    assert (layer.weight[mask] != before[mask]).all()


def test_gradient_is_that_of_the_dense_layer_where_the_mask_is():
    layer = MaskedLinear(IN, OUT, sparsity=0.6, dtype=torch.float64)
    dense, x = layer.to_dense(), torch.randn(5, IN, dtype=torch.float64)
    for module in (layer, dense):
        module(x).square().sum().backward()
    assert layer.weight.grad is not None
    assert dense.weight.grad is not None
    assert torch.equal(layer.weight.grad, dense.weight.grad * layer.dense_mask())


def test_backward_keeps_the_bits_and_not_the_product():
    layer, saved = MaskedLinear(64, 64, sparsity=0.5), []

    def keep(tensor: Tensor) -> Tensor:
        saved.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, 64))
    assert (torch.uint8, 64 * 64 // 8) in saved
    assert (torch.bool, 64 * 64) not in saved


def test_a_weight_that_is_zero_by_chance_goes_on_learning():
    linear = nn.Linear(IN, OUT)
    linear.weight.data.zero_()
    layer = MaskedLinear.from_dense(linear, mask=a_mask())
    mask = layer.dense_mask()
    steps(layer, torch.optim.AdamW(layer.parameters(), lr=0.01))
    assert layer.weight[mask].all()
    assert not layer.weight[~mask].any()


def test_another_mask_and_the_optimizer_s_state():
    layer = MaskedLinear(IN, OUT, sparsity=0.5)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
    steps(layer, optimizer)
    old, new = layer.dense_mask(), a_mask()
    kept = layer.weight.detach().clone()
    layer.set_mask(new)
    layer.mask_optimizer_state(optimizer)
    assert torch.equal(layer.weight, kept * new)  # what is added begins at 0
    assert layer.stored == int(new.sum())
    state = optimizer.state[layer.weight]
    for name in ("exp_avg", "exp_avg_sq"):
        assert not state[name][~new].any()
        assert state[name][old & new].all()
    assert state["step"] == 4
    assert layer.weight.grad is not None
    assert not layer.weight.grad[~new].any()
    steps(layer, optimizer)
    assert torch.equal(layer.weight[~new], torch.zeros(int((~new).sum())))
    assert layer.weight[new & ~old].all()


def test_momentum_would_move_masked_entries_without():
    # what mask_optimizer_state is for
    layer = MaskedLinear(IN, OUT, sparsity=0.5)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    steps(layer, optimizer)
    new = a_mask()
    layer.set_mask(new)
    steps(layer, optimizer, 1)
    assert layer.weight[~new].any()
    assert torch.equal(layer.dense_weight(), layer.weight * new)


def test_optimizers_that_do_not_fit_are_refused():
    layer = MaskedLinear(IN, OUT, sparsity=0.5)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="optimizer does not have this layer's weight"):
        layer.mask_optimizer_state(other)
    optimizer = torch.optim.SGD(layer.parameters())
    layer.mask_optimizer_state(optimizer)  # before its first step
    optimizer.state[layer.weight]["state1"] = torch.zeros(OUT, IN, dtype=torch.uint8)
    with pytest.raises(NotImplementedError, match="SGD keeps state that is not one number an"):
        layer.mask_optimizer_state(optimizer)


def test_largest_of_the_layer():
    linear = nn.Linear(IN, OUT)
    layer = MaskedLinear.from_dense(linear, sparsity=0.75)
    kept = int(0.25 * IN * OUT)
    threshold = linear.weight.abs().flatten().sort(descending=True).values[kept - 1]
    assert torch.equal(layer.dense_mask(), linear.weight.abs() >= threshold)
    assert layer.stored == kept
    assert torch.equal(layer.weight, linear.weight * layer.dense_mask())
    assert layer.bias is not None
    assert torch.equal(layer.bias, linear.bias)


def test_largest_of_every_row_and_of_every_four():
    linear = nn.Linear(40, OUT)
    rows = MaskedLinear.from_dense(linear, sparsity=0.7, support="regular")
    assert (rows.dense_mask().sum(1) == 12).all()
    fours = MaskedLinear.from_dense(linear, support="nm").dense_mask().view(OUT, 10, 4)
    assert (fours.sum(2) == 2).all()
    magnitude = linear.weight.abs().view(OUT, 10, 4)
    smallest_kept = magnitude.masked_fill(~fours, torch.inf).amin(2)
    largest_masked = magnitude.masked_fill(fours, 0).amax(2)
    assert (smallest_kept > largest_masked).all()


def test_of_equal_ones_the_first():
    linear = nn.Linear(8, 4)
    linear.weight.data.fill_(-1.0)
    mask = MaskedLinear.from_dense(linear, sparsity=0.5).dense_mask()
    assert torch.equal(mask, torch.arange(32).view(4, 8) < 16)


def test_from_conv1d_with_a_random_mask():
    conv = Conv1D(OUT, IN).eval()
    layer = MaskedLinear.from_dense(conv, sparsity=0.5, seed=3, init="random")
    mask = Support("uniform", OUT, IN, 0.5, 3).mask()
    assert torch.equal(layer.weight, conv.weight.T * mask)
    assert layer.settings()["seed"] == 3
    assert not layer.training


def test_to_dense_drops_the_mask_and_keeps_zeros():
    layer = MaskedLinear(IN, OUT, sparsity=0.75)
    dense = layer.to_dense()
    x = torch.randn(4, IN)
    assert torch.equal(dense(x), layer(x))
    dense(x).square().sum().backward()
    assert dense.weight.grad is not None
    # SPDF's dense fine-tuning: zeros learn
    assert dense.weight.grad[~layer.dense_mask()].all()


def test_saved_and_copied():
    layer = MaskedLinear.from_dense(nn.Linear(IN, OUT), mask=a_mask())
    x = torch.randn(4, IN)
    expected = functional.linear(x, layer.weight, layer.bias)
    other = MaskedLinear(**json.loads(json.dumps(layer.settings())))
    assert other.stored == IN * OUT
    other.load_state_dict(load(save(layer.state_dict())))
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), expected)
        assert torch.equal(same.dense_mask(), layer.dense_mask())
    assert layer.state_dict()["mask"].numel() == -(-IN * OUT // 8)
    drawn = MaskedLinear(40, OUT, support="nm", seed=2)
    again = MaskedLinear(**json.loads(json.dumps(drawn.settings())))
    assert torch.equal(again.dense_mask(), drawn.dense_mask())
    assert repr(MaskedLinear(8, 4, sparsity=0.75)) == (
        "MaskedLinear(in_features=8, out_features=4, bias=True, sparsity=0.75, support=uniform, "
        "seed=0)"
    )


@pytest.mark.parametrize("init", ["magnitude", "random"])
def test_a_converted_model_is_saved_and_loaded(init: Any, tmp_path: Any):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    model = sparsify(LlamaForCausalLM(config), Masked(sparsity=0.75, init=init)).eval()
    tokens = torch.arange(12)[None]
    model.save_pretrained(tmp_path)
    again = apical.load(tmp_path).eval()
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    before = replaced(model)
    for name, layer in replaced(again).items():
        assert isinstance(layer, MaskedLinear)
        old = before[name]
        assert isinstance(old, MaskedLinear)
        assert torch.equal(layer.dense_mask(), old.dense_mask())
        assert layer.stored == int(0.25 * layer.weight.numel())
    # another seed for every layer
    masks = [layer.mask for layer in before.values() if layer.weight.shape == (32, 32)]
    assert not torch.equal(masks[0], masks[1])


def test_on_meta():
    linear = nn.Linear(IN, OUT, device="meta", dtype=torch.float16)
    layer = MaskedLinear.from_dense(linear, sparsity=0.75)
    assert (layer.weight.is_meta, layer.weight.dtype, layer.mask.is_meta) == (
        True, torch.float16, True,
    )  # fmt: skip
    assert layer.flops(10) == 2 * 10 * int(0.25 * IN * OUT)
    assert layer.to_dense().weight.is_meta
    filled = MaskedLinear(IN, OUT, sparsity=0.75, device="meta").to_empty(device="cpu")
    filled.reset_parameters()
    assert filled.stored == int(0.25 * IN * OUT)
    assert filled(torch.randn(2, IN)).isfinite().all()


def test_flops_are_those_of_stored_entries():
    layer = MaskedLinear.from_dense(nn.Linear(IN, OUT), mask=a_mask())
    assert layer.flops(100) == 2 * 100 * int(layer.dense_mask().sum())


# dynamo makes an instance of every torch.autograd.Function, which torch warns of
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_in_one_graph():
    layer = MaskedLinear(IN, OUT, sparsity=0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, IN)
    results = []
    for module in (layer, compiled):
        out = module(x)
        results.append((out, torch.autograd.grad(out.sum(), layer.weight)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype):
    layer = MaskedLinear(IN, OUT, sparsity=0.5, dtype=dtype)
    x = torch.randn(4, IN, dtype=dtype)
    assert torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert MaskedLinear(IN, OUT, sparsity=0.5)(torch.randn(4, IN)).dtype == torch.bfloat16
