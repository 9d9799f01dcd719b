"""Multi-level operators: what coalescing and de-coalescing do to weights and to the function."""

import pytest
import torch

from apical.growth.apply import grow
from apical.growth.operators import Coalesce, Decoalesce, Widen
from apical.growth.spaces import architecture_of


def _plan(operator, model):
    return operator.plan(model.config.to_dict())


_FACTORS = {
    "both": {},
    "width alone": {"depth": 1},
    "depth alone": {"width": 1},
    "a factor each": {"factor": 1, "width": 2, "depth": 3},
}


@pytest.mark.parametrize("factors", _FACTORS.values(), ids=_FACTORS)
def test_coalescing_what_was_decoalesced_is_the_identity(tiny, any_family, factors):
    model = tiny(any_family, dtype=torch.float64)
    back = grow(grow(model, Decoalesce(**factors)), Coalesce(**factors))
    table = architecture_of(model.config.to_dict())
    assert table.sizes(back.config.to_dict()) == table.sizes(model.config.to_dict())
    for name, old in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], old, rtol=0, atol=1e-12, msg=name)


def test_decoalescing_what_was_coalesced_is_a_projection(tiny):
    model = grow(tiny("llama-every-bias", dtype=torch.float64), Decoalesce(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    once = grow(grow(model, Coalesce()), Decoalesce())
    twice = grow(grow(once, Coalesce()), Decoalesce())
    for name, old in once.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[name], old, rtol=0, atol=1e-12, msg=name)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert float((once.state_dict()[weight] - model.state_dict()[weight]).abs().max()) > 0.1


def test_width_alone_keeps_the_function_and_is_a_widening(tiny, any_family, run, double):
    model = tiny(any_family, dtype=torch.float64)
    plan = _plan(Decoalesce(depth=1), model)
    assert plan.preserves_function
    assert plan.spaces == _plan(Widen(factor=2), model).spaces
    old, new = run(model), run(grow(model, plan))
    assert float((new - old).abs().max() / old.abs().max()) <= 1e-10


def test_depth_changes_the_function(tiny, run):
    model = tiny("llama-tied", dtype=torch.float64)
    plan = _plan(Decoalesce(width=1), model)
    assert not plan.preserves_function
    assert float((run(grow(model, plan)) - run(model)).abs().max()) > 1e-3


def test_matrices_are_those_of_the_paper(tiny):
    model = tiny("llama-no-groups-yarn", dtype=torch.float64)
    down = _plan(Coalesce(depth=1), model).spaces["ffn"]
    half = torch.eye(24, dtype=torch.float64)
    assert torch.equal(down.carries.matrix(), torch.cat([half, half], dim=1) / 2)
    assert torch.equal(down.reads.matrix(), torch.cat([half, half], dim=1))
    up = _plan(Decoalesce(depth=1), model).spaces["ffn"]
    whole = torch.eye(48, dtype=torch.float64)
    assert torch.equal(up.carries.matrix(), torch.cat([whole, whole]))
    assert torch.equal(up.reads.matrix(), torch.cat([whole, whole]) / 2)


def test_neighbouring_layers_are_averaged(tiny):
    model = grow(tiny("llama-tied", dtype=torch.float64), Decoalesce(width=1))
    plan = _plan(Coalesce(width=1), model)
    pairs = [((2 * new, 0.5), (2 * new + 1, 0.5)) for new in range(3)]
    assert [layer.terms for layer in plan.layers] == pairs
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1)
    small = grow(model, plan)
    expected = model.model.layers[0].mlp.up_proj.weight + 0.5
    torch.testing.assert_close(small.model.layers[0].mlp.up_proj.weight, expected)


def test_gains_of_norms_are_averaged(tiny):
    model = grow(tiny("gemma3-untied", dtype=torch.float64), Decoalesce(depth=1))
    gain = torch.arange(64, dtype=torch.float64)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.copy_(gain)
    small = grow(model, Coalesce(depth=1))
    expected = (gain[:32] + gain[32:]) / 2
    torch.testing.assert_close(small.model.layers[0].input_layernorm.weight.detach(), expected)


@pytest.mark.parametrize("operator", [Coalesce, Decoalesce])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        pytest.param({"factor": 0}, "factor is 0; expected an integer of at least 1", id="none"),
        pytest.param({"factor": 1.5}, "factor is 1.5; expected an integer", id="not whole"),
        pytest.param({"width": -1}, "width is -1; expected an integer", id="negative"),
        pytest.param({"factor": 1}, "nothing changes; expected factor 2", id="nothing"),
        pytest.param({"width": 1, "depth": 1}, "nothing changes", id="nothing by parts"),
    ],
)
def test_factors_that_make_no_sense_are_refused(operator, options, match):
    with pytest.raises(ValueError, match=match):
        operator(**options)


@pytest.mark.parametrize(
    ("operator", "match"),
    [
        pytest.param(Coalesce(), "layers is 3; expected a multiple of factor 2", id="depth"),
        pytest.param(Coalesce(3, depth=1), "hidden is 32; expected a multiple", id="width"),
        pytest.param(Coalesce(4, depth=1), "kv_heads is 2; expected a multiple", id="heads"),
    ],
)
def test_sizes_that_cannot_be_divided_are_named(tiny, operator, match):
    with pytest.raises(ValueError, match=match):
        _plan(operator, tiny("llama-tied"))
