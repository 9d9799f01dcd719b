import dataclasses

import pytest
import torch

from apical.growth.apply import grow
from apical.growth.mapping import Mapper
from apical.growth.operators import Stack, Widen
from apical.growth.plan import LayerSource


def _mapped(model, plan, name, **options):
    old = dict(model.named_parameters())
    return Mapper(plan, model.config.to_dict(), **options).tensor(name, lambda n: old[n].detach())


def test_shapes_are_those_of_the_grown_model(tiny, any_family):
    model = tiny(any_family)
    config = model.config.to_dict()
    mapper = Mapper(Widen().plan(config), config)
    if any(mapper.table.stacked):
        pytest.skip("its parameters are several stock tensors each")
    naming = mapper.table.stock_name
    for name, parameter in grow(model, Widen()).named_parameters():
        assert mapper.shape(naming(name)) == parameter.shape, name


def test_copies_are_told_from_what_changes(tiny):
    model = tiny("llama-every-bias")
    config = model.config.to_dict()
    stacked, wider = (
        Mapper(Stack().plan(config), config),
        Mapper(Widen(ffn=96).plan(config), config),
    )
    assert (
        stacked.copies("model.layers.4.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"
    )
    name = "model.layers.1.self_attn.q_proj.weight"
    assert wider.copies(name) == name
    assert wider.copies("model.layers.1.mlp.down_proj.weight") is None
    assert wider.copies("model.layers.1.mlp.down_proj.bias") == "model.layers.1.mlp.down_proj.bias"
    halved = dataclasses.replace(
        Stack().plan(config), layers=(LayerSource(((0, 0.5),)), LayerSource(((1, 1.0),)))
    )
    assert Mapper(halved, config).copies(name.replace("1", "0")) is None


def test_results_own_their_storage_even_of_copies(tiny):
    model = tiny("llama-every-bias")
    name = "model.layers.1.self_attn.q_proj.weight"
    copied = _mapped(model, Widen(ffn=96).plan(model.config.to_dict()), name)
    assert torch.equal(copied, model.get_parameter(name))
    assert copied.data_ptr() != model.get_parameter(name).data_ptr()


def test_directions_ahead_are_those_of_the_next_layer(tiny):
    model = tiny("llama-every-bias", dtype=torch.float64)
    plan = Widen(ffn=96).plan(model.config.to_dict())
    ahead = torch.arange(96) >= 48
    spaces = {"ffn": dataclasses.replace(plan.spaces["ffn"], ahead=ahead)}
    plan = dataclasses.replace(plan, spaces=spaces)
    layers = model.model.layers
    for at in range(3):
        up = _mapped(model, plan, f"model.layers.{at}.mlp.up_proj.weight")
        following = layers[min(at + 1, 2)].mlp.up_proj.weight
        assert torch.equal(up, torch.cat([layers[at].mlp.up_proj.weight, following]))
        # what reads them stays at home, with its shares
        down = _mapped(model, plan, f"model.layers.{at}.mlp.down_proj.weight")
        assert torch.equal(down, layers[at].mlp.down_proj.weight.tile(1, 2) / 2)


def test_a_norm_that_no_old_layer_has_is_one(tiny):
    model = tiny("modernbert-tied")
    plan = Stack().plan(model.config.to_dict())
    gain = _mapped(model, plan, "model.layers.2.attn_norm.weight")
    assert torch.equal(gain, torch.ones(32))
    moments = _mapped(model, plan, "model.layers.2.attn_norm.weight", gradient=True)
    assert torch.equal(moments, torch.zeros(32))
