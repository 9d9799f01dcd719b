import pytest
import torch

from apical.growth.apply import grow
from apical.growth.operators import Stack, Zero
from apical.growth.optimizer_state import grow_optimizer
from apical.growth.plan import GrowthPlan, LayerSource

_KINDS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "AdamW, maximum kept": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
}


def _by_name(model, optimizer):
    return {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}


def _shapes(model):
    return {name: p.shape for name, p in model.named_parameters()}


def _trained(model, tokens, kind="AdamW", steps=3):
    optimizer = _KINDS[kind](model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize(
    "family", ["llama-tied", "qwen2-window-from-layer-2"], ids=["tied", "untied, biases"]
)
def test_stack_copies_the_state_of_each_parameter(tiny, tokens, family, kind):
    model = tiny(family)
    state = _by_name(model, _trained(model, tokens, kind))
    grown = grow(model, Stack())
    plan = Stack().plan(model.config.to_dict())
    result = grow_optimizer(plan, state, _shapes(grown))
    assert list(result) == [name for name, _ in grown.named_parameters()]
    assert ("lm_head.weight" in result) == (family != "llama-tied")
    for name, moments in result.items():
        parts = name.split(".")
        if "layers" in parts:
            parts[2] = str(int(parts[2]) % 3)
        old = state[".".join(parts)]
        assert moments.keys() == old.keys()
        for key, value in moments.items():
            assert torch.equal(value, old[key]), (name, key)
            assert value.data_ptr() != old[key].data_ptr()
            assert value.dtype == old[key].dtype


@pytest.mark.parametrize("kind", _KINDS)
def test_the_grown_state_steps_as_the_old_one_did(tiny, tokens, kind):
    model = tiny("llama-tied")
    old = _trained(model, tokens, kind)
    grown = grow(model, Stack())
    new = _KINDS[kind](grown.parameters())
    result = grow_optimizer(
        Stack().plan(model.config.to_dict()), _by_name(model, old), _shapes(grown)
    )
    for name, parameter in grown.named_parameters():
        new.state[parameter] = result[name]
    # the same gradients: then every copy must move as the layer that it came from
    for parameter in [*model.parameters(), *grown.parameters()]:
        parameter.grad = torch.full_like(parameter, 0.01)
    old.step()
    new.step()
    again = grow(model, Stack())
    for (name, moved), expected in zip(grown.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(moved, expected), name


def test_zeroed_weights_start_anew_and_the_others_go_on(tiny, tokens):
    model = tiny("llama-every-bias")
    state = _by_name(model, _trained(model, tokens))
    plan = Zero(2).plan(model.config.to_dict())
    result = grow_optimizer(plan, state, _shapes(grow(model, Zero(2))))
    zeroed = [name for name in result if plan.sources(name).zero]
    assert len(zeroed) == 3 * 4  # o_proj and down_proj, weight and bias, of three copies
    for name, moments in result.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert (moments[key].abs().max() == 0) == (name in zeroed), (name, key)
        assert moments["step"] == (0 if name in zeroed else 3), name


def test_sums_of_layers_map_first_moments_linearly_and_second_ones_squared():
    mix = LayerSource(((0, 0.25), (1, -2.0)))
    plan = GrowthPlan("mix", {}, "llama", (mix,))
    inner = "mlp.up_proj.weight"
    values = {0: torch.tensor([1.0, 3.0]), 1: torch.tensor([5.0, 7.0])}
    state = {
        f"model.layers.{layer}.{inner}": {"exp_avg": v, "exp_avg_sq": v, "step": 4}
        for layer, v in values.items()
    }
    result = grow_optimizer(plan, state, {f"model.layers.0.{inner}": (2,)})
    moments = result[f"model.layers.0.{inner}"]
    assert moments["exp_avg"].tolist() == [0.25 * 1 - 2 * 5, 0.25 * 3 - 2 * 7]
    assert moments["exp_avg_sq"].tolist() == [0.0625 * 1 + 4 * 5, 0.0625 * 3 + 4 * 7]
    assert moments["step"] == 4


def test_frozen_parameters_have_no_state(tiny, tokens):
    model = tiny("llama-tied")
    model.model.layers[1].requires_grad_(False)
    state = _by_name(model, _trained(model, tokens))
    result = grow_optimizer(
        Stack().plan(model.config.to_dict()), state, _shapes(grow(model, Stack()))
    )
    absent = {name for name in _shapes(grow(model, Stack())) if name not in result}
    assert absent == {
        name for name in _shapes(grow(model, Stack())) if name.split(".")[2] in ("1", "4")
    }


def test_state_of_an_unknown_kind_is_refused():
    plan = Stack().plan({"model_type": "llama", "num_hidden_layers": 1})
    state = {"model.norm.weight": {"exp_avg_sq_row": torch.ones(2)}}
    with pytest.raises(ValueError, match="'exp_avg_sq_row' cannot be grown; known: step, exp_avg"):
        grow_optimizer(plan, state, {"model.norm.weight": (2,)})


def test_state_of_another_model_is_refused():
    plan = Stack().plan({"model_type": "llama", "num_hidden_layers": 1})
    state = {"model.norm.weight": {"exp_avg": torch.ones(3)}}
    with pytest.raises(ValueError, match=r"exp_avg of model\.norm\.weight would have shape \(3,\)"):
        grow_optimizer(plan, state, {"model.norm.weight": (2,)})
