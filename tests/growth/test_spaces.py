"""The tables are held against transformers' own models."""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from apical.growth.spaces import architecture_of, check_tensors, decoders
from apical.growth.spaces.naming import Naming, shape_at


def _shapes(model):
    return {name: p.shape for name, p in model.named_parameters()}


def _stock(model):
    """Return the tensors as transformers itself would save them."""
    return revert_weight_conversion(model, dict(model.named_parameters()))


def test_table_holds_every_weight_of_the_model_and_no_other(tiny, any_family):
    model = tiny(any_family)
    config, shapes = model.config.to_dict(), {n: t.shape for n, t in _stock(model).items()}
    check_tensors(config, shapes)
    weights = architecture_of(config).weights(config)
    for name, shape in shapes.items():
        less = {n: s for n, s in shapes.items() if n != name}
        if not weights[name].optional:
            with pytest.raises(ValueError, match=rf"missing: {re.escape(name)}(, [\w.]+)?$"):
                check_tensors(config, less)
        with pytest.raises(ValueError, match=f"1 of another shape: {re.escape(name)} "):
            check_tensors(config, shapes | {name: (*shape[:-1], shape[-1] + 1)})


def test_parameters_in_memory_are_views_of_the_tensors_that_transformers_saves(tiny, any_family):
    model = tiny(any_family)
    live = dict(model.named_parameters())
    naming = Naming.of(architecture_of(model.config.to_dict()), live)
    places, stock = naming.places(_shapes(model)), _stock(model)
    assert places.keys() == stock.keys()
    for name, place in places.items():
        view = place.of(live[place.name])
        assert torch.equal(view, stock[name]), name
        assert view.untyped_storage().data_ptr() == live[place.name].untyped_storage().data_ptr()
        assert shape_at(place, live[place.name].shape) == stock[name].shape
    for name, parameter in live.items():
        built = naming.build(name, parameter.shape, stock.__getitem__)
        assert torch.equal(built, parameter), name


@pytest.mark.parametrize("head", ["", "SequenceClassification"], ids=["none", "classifier"])
def test_other_heads_than_the_usual_one_are_known(tiny, any_family, head):
    if head and any_family == "vit":
        pytest.skip("its usual head is a classifier")
    model = tiny(any_family, head=head)
    live = _shapes(model)
    naming = Naming.of(architecture_of(model.config.to_dict()), live)
    shapes = {n: shape_at(p, live[p.name]) for n, p in naming.places(live).items()}
    check_tensors(model.config.to_dict(), shapes, head=naming.whole_model)
    assert naming.whole_model == bool(head)
    assert {naming.stored(name) for name in shapes} == _stock(model).keys()


def test_unexpected_tensors_are_listed_the_first_few(tiny):
    model = tiny("llama-tied")
    extra = {f"model.layers.0.adapter_{i}.weight": (2, 2) for i in range(5)}
    with pytest.raises(ValueError, match=r"a llama with 3 layers: 5 unexpected: .*_0.*, …$"):
        check_tensors(model.config.to_dict(), _shapes(model) | extra)


def test_a_layer_too_many_is_unexpected(tiny):
    model = tiny("mistral-window")
    config = model.config.to_dict() | {"num_hidden_layers": 2}
    with pytest.raises(ValueError, match=r"9 unexpected: model\.layers\.2\."):
        check_tensors(config, _shapes(model))


def test_a_bias_that_the_config_does_not_ask_for_is_unexpected(tiny):
    model = tiny("llama-every-bias")
    config = model.config.to_dict() | {"mlp_bias": False}
    with pytest.raises(ValueError, match=r"9 unexpected: model\.layers\.0\.mlp\.\w+\.bias"):
        check_tensors(config, _shapes(model))


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_embeddings_may_be_stored_under_either_name(tiny, kept):
    model = tiny("llama-tied")
    config, shapes = model.config.to_dict(), _shapes(model)
    embedding = shapes.pop("model.embed_tokens.weight")
    check_tensors(config, shapes | {kept: embedding})
    with pytest.raises(ValueError, match="2 missing"):
        check_tensors(config, shapes)
    with pytest.raises(ValueError, match="1 missing"):
        check_tensors(config | {"tie_word_embeddings": False}, shapes | {kept: embedding})


def test_rotary_frequencies_of_old_checkpoints_are_known(tiny):
    model = tiny("llama-tied")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}
    check_tensors(model.config.to_dict(), _shapes(model) | old)


def test_zeroing_the_residual_weights_makes_a_layer_the_identity(tiny, family, tokens):
    model = tiny(family, dtype=torch.float64)
    silent = architecture_of(model.config.to_dict()).residual_weights(model.config.to_dict())
    layer = model.model.layers[1]
    seen = []
    layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        kept = {name: layer.get_parameter(name).clone() for name in silent}
        for name in silent:
            layer.get_parameter(name).zero_()
        model(tokens)
        for name in silent:  # each of them alone breaks the identity
            layer.get_parameter(name).copy_(kept[name])
            model(tokens)
            layer.get_parameter(name).zero_()
    assert torch.equal(*seen[0])
    assert all(not torch.equal(*pair) for pair in seen[1:])
    assert len(seen) == 1 + len(silent) >= 3


def test_names_are_split_and_joined(tiny):
    table = architecture_of({"model_type": "llama"})
    name = "model.layers.12.mlp.up_proj.weight"
    assert table.split(name) == (12, "mlp.up_proj.weight")
    assert table.join(12, "mlp.up_proj.weight") == name
    for shared in ("model.norm.weight", "model.layers.x.weight", "lm_head.weight"):
        assert table.split(shared) == (None, shared)


def test_unknown_family_shows_how_to_add_it():
    with pytest.raises(NotImplementedError) as caught:
        architecture_of({"model_type": "llamb"})
    message, _, example = str(caught.value).partition(":\n")
    assert "'llamb'" in message
    assert "gpt_neox, llama, mistral, mixtral" in message
    assert "growth/spaces/decoders.py" in message
    (table,) = eval(f"({example.strip()})", dict(vars(decoders)))
    config = AutoConfig.for_model(
        "llama", hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {table.join(0, name) for name in table.layer} | set(table.shared)
    assert table.model_types == ("llamb",)
    assert names >= {name for name, _ in model.named_parameters()}


def test_config_without_a_family_is_refused():
    with pytest.raises(NotImplementedError, match="model_type None"):
        architecture_of({"hidden_size": 8})
