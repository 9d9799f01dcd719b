import pytest
import torch

from apical.growth.apply import grow
from apical.growth.operators import RandomDepth, Stack, Widen, ZeroDepth
from apical.growth.optimizer_state import grow_optimizer
from apical.growth.plan import GrowthPlan, LayerSource

_KINDS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "AdamW, maximum kept": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
}
_LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 2,
    "intermediate_size": 2,
    "num_attention_heads": 1,
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
    config = model.config.to_dict()
    result = grow_optimizer(Stack().plan(config), config, state, _shapes(grown))
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
    config = model.config.to_dict()
    result = grow_optimizer(Stack().plan(config), config, _by_name(model, old), _shapes(grown))
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
    config = model.config.to_dict()
    plan = ZeroDepth(2).plan(config)
    result = grow_optimizer(plan, config, state, _shapes(grow(model, ZeroDepth(2))))
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
    result = grow_optimizer(plan, _LLAMA, state, {f"model.layers.0.{inner}": (2,)})
    moments = result[f"model.layers.0.{inner}"]
    assert moments["exp_avg"].tolist() == [0.25 * 1 - 2 * 5, 0.25 * 3 - 2 * 7]
    assert moments["exp_avg_sq"].tolist() == [0.0625 * 1 + 4 * 5, 0.0625 * 3 + 4 * 7]
    assert moments["step"] == 4


def test_frozen_parameters_have_no_state(tiny, tokens):
    model = tiny("llama-tied")
    model.model.layers[1].requires_grad_(False)
    state = _by_name(model, _trained(model, tokens))
    config = model.config.to_dict()
    result = grow_optimizer(Stack().plan(config), config, state, _shapes(grow(model, Stack())))
    absent = {name for name in _shapes(grow(model, Stack())) if name not in result}
    assert absent == {
        name for name in _shapes(grow(model, Stack())) if name.split(".")[2] in ("1", "4")
    }


def test_state_of_an_unknown_kind_is_refused():
    plan = Stack().plan(_LLAMA)
    state = {"model.norm.weight": {"exp_avg_sq_row": torch.ones(2)}}
    with pytest.raises(ValueError, match="'exp_avg_sq_row' cannot be grown; known: step, exp_avg"):
        grow_optimizer(plan, _LLAMA, state, {"model.norm.weight": (2,)})


def test_state_of_another_model_is_refused():
    plan = Stack().plan(_LLAMA)
    state = {"model.norm.weight": {"exp_avg": torch.ones(3)}}
    with pytest.raises(ValueError, match=r"exp_avg of model\.norm\.weight would have shape \(3,\)"):
        grow_optimizer(plan, _LLAMA, state, {"model.norm.weight": (2,)})


def _gradients(model, tokens):
    if model.config.model_type == "vit":
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        out = model(pixel_values=pixels.to(model.dtype))[0]
    else:
        out = model(input_ids=tokens)[0]
    # any loss will do: what it is a function of is the same in both models
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    (out * weight).mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _compared(model, operator, tokens):
    """Return the plan, and name -> (autograd's gradient, the image of the old model's)."""
    config = model.config.to_dict()
    plan, grown = operator.plan(config), grow(model, operator)
    old = {n: {"exp_avg": g} for n, g in _gradients(model, tokens).items()}
    result = grow_optimizer(plan, config, old, _shapes(grown))
    new = _gradients(grown, tokens)
    assert result.keys() == new.keys()
    return plan, {name: (gradient, result[name]["exp_avg"]) for name, gradient in new.items()}


def test_first_moments_are_the_gradients_of_the_wider_model(tiny, any_family, tokens, double):
    model = tiny(any_family, dtype=torch.float64)
    plan, pairs = _compared(model, Widen(factor=2), tokens)
    assert plan.preserves_function
    for name, (expected, mapped) in pairs.items():
        torch.testing.assert_close(mapped, expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("family", "operator"),
    [
        pytest.param("llama-tied", Widen(factor=1.5), id="uneven copies under RMS norms"),
        pytest.param("llama-every-bias", Widen(ffn=96, split=0.3), id="uneven shares"),
        pytest.param("bert-tied", Widen(ffn=72), id="some directions copied"),
        pytest.param("llama-tied", Widen(heads=8, kv_heads=4), id="heads with their keys"),
        pytest.param("qwen3-head-norms-wide-heads", Widen(head_dim=32), id="norms of longer heads"),
        pytest.param("gpt2-tied", Widen(factor=3, split=0.0), id="three copies, tied"),
        pytest.param("gemma2-tied", Widen(hidden=48), id="scaled embeddings, tied"),
    ],
)
def test_first_moments_are_right_for_each_kind_of_map(tiny, family, operator, tokens, double):
    plan, pairs = _compared(tiny(family, dtype=torch.float64), operator, tokens)
    assert plan.preserves_function
    for name, (expected, mapped) in pairs.items():
        torch.testing.assert_close(mapped, expected, rtol=1e-9, atol=1e-12, msg=name)


def test_keys_of_their_own_share_what_the_shared_ones_would_move(tiny, tokens, double):
    model = tiny("llama-every-bias", dtype=torch.float64)
    _, pairs = _compared(model, Widen(kv_heads=4), tokens)
    for name, (expected, mapped) in pairs.items():
        if "k_proj" in name or "v_proj" in name:
            # two copies each: their sum is known, how it is divided is not
            expected, mapped = (g.unflatten(0, (2, 2, 8)).sum(1) for g in (expected, mapped))
        torch.testing.assert_close(mapped, expected, rtol=1e-9, atol=1e-12, msg=name)


def test_layers_that_stay_keep_the_gradient_that_they_had(tiny, tokens, double):
    model = tiny("qwen3-moe-tied", dtype=torch.float64)
    _, pairs = _compared(model, ZeroDepth(2), tokens)
    kept = [name for name in pairs if ".layers." in name and int(name.split(".")[2]) % 2 == 0]
    assert len(kept) == 2 * 11
    for name in kept:
        expected, mapped = pairs[name]
        torch.testing.assert_close(mapped, expected, rtol=1e-9, atol=1e-12, msg=name)


def test_second_moments_follow_the_squared_map(tiny):
    model = tiny("mixtral")
    config = model.config.to_dict()
    ones = {
        name: {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p), "step": 5}
        for name, p in model.named_parameters()
    }
    plan = Widen(ffn=96).plan(config)
    result = grow_optimizer(plan, config, ones, _shapes(grow(model, Widen(ffn=96))))
    up = result["model.layers.1.mlp.experts.gate_up_proj"]
    down = result["model.layers.1.mlp.experts.down_proj"]
    # what writes copies gets half the gradient, what reads them the whole of it
    for kind, half in (("exp_avg", 0.5), ("exp_avg_sq", 0.25)):
        assert torch.equal(up[kind], torch.full((3, 192, 32), half))
        assert torch.equal(down[kind], torch.ones(3, 32, 96))
    assert up["step"] == down["step"] == 5


def test_new_directions_and_random_layers_start_anew(tiny):
    model = tiny("gemma2-tied")
    config = model.config.to_dict()
    ones = {n: {"exp_avg": torch.ones_like(p), "step": 5} for n, p in model.named_parameters()}
    zero = Widen(ffn=96, new="zero")
    result = grow_optimizer(zero.plan(config), config, ones, _shapes(grow(model, zero)))
    up = result["model.layers.0.mlp.up_proj.weight"]["exp_avg"]
    assert torch.equal(up[:48], torch.ones(48, 32))
    assert up[48:].abs().max() == 0
    drawn = RandomDepth()
    result = grow_optimizer(drawn.plan(config), config, ones, _shapes(grow(model, drawn)))
    for name, moments in result.items():
        fresh = ".layers.2." in name or ".layers.3." in name
        assert moments["step"] == (0 if fresh else 5), name
        assert moments["exp_avg"].unique().tolist() == [0.0 if fresh else 1.0], name
