"""SLTrain's layer: its definition, initial values, and what is saved of it."""

import copy
import io
import json
import math
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from apical import SparseLowRankLinear, Support

# ragged: no multiple of a vector, a block or each other
IN, OUT = 37, 52
SETTINGS: dict[str, Any] = {"rank": 5, "density": 0.1, "alpha": 8.0, "seed": 3}
SUPPORTS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "regular": {"support": "regular"},
    "grouped": {"support": "grouped", "block": (16, 8)},  # the default is wider than the layer
    "nm": {"support": "nm", "block": (5, 37), "density": 5 / 37},  # 37 is prime: one group a row
    "explicit": {"support": "explicit", "positions": torch.tensor([700, 3, 1923, 40])}
    | {"density": None},  # first and last rows, not ascending
}


def settings_of(kind: str = "uniform", **changes: Any) -> dict[str, Any]:
    return SETTINGS | SUPPORTS[kind] | changes


def layer_of(kind: str = "uniform", *, dtype: torch.dtype = torch.float32, **changes: Any):
    """A layer with no parameter at an initial value that would hide a mistake."""
    torch.manual_seed(0)
    layer = SparseLowRankLinear(IN, OUT, **settings_of(kind, **changes), dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def weight_of(layer: SparseLowRankLinear) -> Tensor:
    """SLTrain's definition of the weight, in float64."""
    weight = layer.alpha / layer.rank * layer.b.double() @ layer.a.double()
    return weight.flatten().index_add(0, layer.support.flat(), layer.values.double()).view(OUT, IN)


@pytest.mark.parametrize("kind", SUPPORTS)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_the_dense_weight(kind: str, bias: bool):
    layer = layer_of(kind, bias=bias)
    x = torch.randn(3, 11, IN, requires_grad=True)  # two leading axes
    w = torch.randn(3, 11, OUT)
    inputs = (x, *layer.parameters())
    got = torch.autograd.grad((layer(x) * w).sum(), inputs)
    exact = x.double() @ weight_of(layer).T + (0 if layer.bias is None else layer.bias.double())
    wanted = torch.autograd.grad((exact * w.double()).sum(), inputs)
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)
    for ours, truth in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-4)  # sums of 33 x 52 terms


@pytest.mark.parametrize("kind", SUPPORTS)
def test_gradcheck(kind: str):
    layer = layer_of(kind, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
    # along random directions: every entry by itself takes ten times as long
    assert torch.autograd.gradcheck(output, (x, *parameters), fast_mode=True)


def test_bfloat16_is_near():
    layer = layer_of(dtype=torch.bfloat16)
    x = torch.randn(11, IN, dtype=torch.bfloat16)
    assert layer.bias is not None
    exact = x.double() @ weight_of(layer).T + layer.bias.double()
    error = (layer(x).double() - exact).norm() / exact.norm()
    assert error < 1e-2  # the budget of the method's notes; a rounding is 2 ** -9


def test_recompute_hidden_changes_no_gradient():
    x = torch.randn(11, IN)
    grads = [
        torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        for layer in (layer_of(), layer_of(recompute_hidden=True))
    ]
    torch.testing.assert_close(*grads)


def test_initial_values_are_sltrains():
    torch.manual_seed(0)
    layer = SparseLowRankLinear(384, 600, rank=64, density=0.2, alpha=16.0)
    inside, outside = 1 / math.sqrt(384), 1 / math.sqrt(600)
    assert layer.bias is not None
    assert not layer.b.any()
    for values, bound in ((layer.a, inside), (layer.values, inside), (layer.bias, outside)):
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.98 * bound
        # 5 standard errors of the mean and of the variance of a uniform distribution
        error = 5 / math.sqrt(values.numel())
        assert abs(values.mean()) < error * bound / math.sqrt(3)
        assert abs(values.var() / (bound**2 / 3) - 1) < error


def test_initial_values_are_drawn_in_sltrains_order():
    torch.manual_seed(7)
    layer = SparseLowRankLinear(IN, OUT, **SETTINGS)
    torch.manual_seed(7)
    bound = 1 / math.sqrt(IN)
    bias = torch.empty(OUT).uniform_(-1 / math.sqrt(OUT), 1 / math.sqrt(OUT))
    a = nn.init.kaiming_uniform_(torch.empty(5, IN), a=math.sqrt(5))
    values = torch.empty(int(0.1 * OUT * IN)).uniform_(-bound, bound)
    assert layer.bias is not None
    assert torch.equal(layer.bias, bias)
    assert torch.equal(layer.a, a)
    assert torch.equal(layer.values, values)


def test_seed_moves_positions_and_nothing_else():
    torch.manual_seed(7)
    one = SparseLowRankLinear(IN, OUT, **SETTINGS)
    torch.manual_seed(7)
    two = SparseLowRankLinear(IN, OUT, **settings_of(seed=4))
    assert not torch.equal(one.support.flat(), two.support.flat())
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)


def test_reset_parameters_draws_the_same_again():
    torch.manual_seed(7)
    layer = SparseLowRankLinear(IN, OUT, **SETTINGS)
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        layer.b.fill_(1)
    torch.manual_seed(7)
    layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", SUPPORTS)
def test_to_dense_is_the_same_function(kind: str):
    layer = layer_of(kind).eval()
    layer.values.requires_grad_(False)
    linear = layer.to_dense()
    torch.testing.assert_close(linear.weight.double(), weight_of(layer), rtol=1e-6, atol=1e-6)
    x = torch.randn(4, IN)
    torch.testing.assert_close(linear(x), layer(x), rtol=1e-5, atol=1e-5)
    assert layer.bias is not None
    assert linear.bias.data_ptr() != layer.bias.data_ptr()
    assert linear.weight.requires_grad  # a and b still are
    assert not linear.training


@pytest.mark.parametrize("kind", SUPPORTS)
def test_state_holds_positions_only_where_no_seed_says_them(kind: str):
    layer = layer_of(kind)
    names = {"a", "b", "values", "bias"} | ({"positions"} if kind == "explicit" else set())
    assert set(layer.state_dict()) == names
    loaded = load(save(layer.state_dict()))  # safetensors takes plain tensors alone
    other = SparseLowRankLinear(IN, OUT, **settings_of(kind))
    other.load_state_dict(loaded)
    x = torch.randn(4, IN)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("assign", [False, True])
def test_explicit_positions_come_with_the_state(assign: bool):
    layer = layer_of("explicit")
    assert layer.positions is not None
    assert layer.positions.tolist() == [3, 40, 700, 1923]
    assert layer.positions.dtype == torch.int32
    others = torch.tensor([1, 2, 3, 4])
    other = SparseLowRankLinear(IN, OUT, **settings_of("explicit", positions=others))
    other.load_state_dict(layer.state_dict(), assign=assign)
    x = torch.randn(4, IN)
    assert torch.equal(other(x), layer(x))


def test_unsorted_positions_in_a_state_are_refused():
    layer = layer_of("explicit")
    state = layer.state_dict() | {"positions": torch.tensor([40, 3, 700, 1923])}
    with pytest.raises(ValueError, match="are not ascending; sort them and their values"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("kind", SUPPORTS)
def test_copies_compute_the_same_and_take_no_index_along(kind: str):
    layer = layer_of(kind)
    x = torch.randn(4, IN)
    expected = layer(x)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
    ]
    for other in copies:
        assert not other.support._cache
        assert torch.equal(other(x), expected)
        assert other.a.data_ptr() != layer.a.data_ptr()


@pytest.mark.parametrize("kind", SUPPORTS)
def test_on_meta_and_from_it(kind: str):
    torch.manual_seed(7)
    direct = SparseLowRankLinear(IN, OUT, **settings_of(kind), dtype=torch.bfloat16)
    layer = SparseLowRankLinear(IN, OUT, **settings_of(kind), device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer.to_dense().weight.is_meta
    torch.manual_seed(7)
    layer.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(layer.state_dict(), direct.state_dict(), rtol=0, atol=0)
    from_meta = SparseLowRankLinear.from_dense(
        nn.Linear(IN, OUT, device="meta"), **settings_of(kind)
    )
    assert all(tensor.is_meta for tensor in from_meta.state_dict().values())


@pytest.mark.parametrize("kind", SUPPORTS)
def test_settings_build_the_layer_anew(kind: str):
    layer = layer_of(kind, bias=False)
    settings = json.loads(json.dumps(layer.settings()))
    other = SparseLowRankLinear(**settings, positions=layer.positions)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dense_weight(), layer.dense_weight())
    assert other.settings() == layer.settings()


def test_repr_says_the_settings():
    assert repr(layer_of("grouped", bias=False)) == (
        "SparseLowRankLinear(in_features=37, out_features=52, bias=False, rank=5, alpha=8.0, "
        "support=grouped, density=0.1, seed=3, block=[16, 8], recompute_hidden=False)"
    )


def test_flops_are_those_of_three_products():
    stored = int(0.1 * OUT * IN)
    assert layer_of().flops(100) == 2 * 100 * (5 * IN + 5 * OUT + stored)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"rank is 0; expected an integer in 1 \.\. 37, the smaller of in_fea"),
        ({"rank": 38}, r"rank is 38; expected an integer in 1 \.\. 37"),
        ({"rank": 0.25}, r"rank is 0\.25; expected an integer"),
        ({"rank": True}, r"rank is True; expected an integer"),
        ({"alpha": 0.0}, r"alpha is 0\.0; expected a positive number"),
        ({"alpha": math.nan}, r"alpha is nan; expected a positive number"),
        ({"density": None}, r"density is missing; expected the share of entries to store"),
        ({"density": 1.5}, r"density must be above 0 and at most 1, got 1\.5"),
        ({"support": "random"}, r"support must be one of uniform, .*, got 'random'"),
        ({"support": "explicit"}, r"support is 'explicit' with no positions; .* come together"),
        ({"positions": torch.tensor([1])}, r"support is 'uniform' with positions; .* together"),
        (
            {"support": "explicit", "positions": torch.tensor([1])},
            r"density is 0\.1; explicit positions have their own: pass None",
        ),
        ({"support": "grouped", "block": (16, 64)}, r"grouped needs in_features of at least"),
        ({"seed": -1}, r"seed must be in 0 \.\. 2\*\*63 - 1, got -1"),
    ],
)
def test_arguments_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SparseLowRankLinear(IN, OUT, **settings_of(**changes))


@pytest.mark.parametrize("name", ["in_features", "out_features"])
def test_empty_layers_are_refused(name: str):
    shape: dict[str, Any] = {"in_features": 4, "out_features": 4} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        SparseLowRankLinear(**shape, **SETTINGS)


def test_an_empty_batch_and_nan():
    layer = layer_of()
    x = torch.empty(0, IN, requires_grad=True)
    layer(x).sum().backward()
    assert layer(x).shape == (0, OUT)
    assert layer.values.grad is not None
    assert not layer.values.grad.any()
    poisoned = torch.randn(3, IN)
    poisoned[1] = torch.nan
    rows = layer(poisoned).isnan().any(1)
    assert rows.tolist() == [False, True, False]


def test_the_support_of_a_layer_is_that_of_its_arguments():
    layer = layer_of("grouped")
    same = Support("grouped", OUT, IN, 0.1, 3, block=(16, 8))
    assert torch.equal(layer.support.flat(), same.flat())
