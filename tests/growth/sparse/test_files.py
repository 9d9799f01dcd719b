"""Converted models are saved by transformers itself and loaded as they were."""

import json
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import apical
from apical.growth.spaces import architecture_of
from apical.growth.sparse import (
    RULES as NAMED,
)
from apical.growth.sparse import (
    Block,
    LowRank,
    Masked,
    Monarch,
    SparseLowRank,
    describe,
    replaced,
    sparsify,
)
from apical.growth.sparse.layers import SparseLowRankLinear
from apical.kernels.sparse_low_rank import Support

RULES = {
    "uniform": SparseLowRank(rank=4, density=0.1),
    "regular-share": SparseLowRank(rank=0.5, density=0.25, support="regular", seed=3),
    # 16 rows: the last group of 48 or 32 rows is whole, that of 8 columns by default would not fit
    "grouped": SparseLowRank(rank=4, density=0.25, support="grouped", block=(16, 8)),
    "nm": SparseLowRank(rank=4, density=0.25, support="nm", block=(1, 4), recompute_hidden=True),
    "low-rank": LowRank(rank=4),
    "cola": LowRank(rank=4, activation="silu", init="cola"),
    "masked-magnitude": Masked(sparsity=0.75),
    "masked-random": Masked(sparsity=0.75, init="random"),
    "masked-2:4": Masked(support="nm", init="random"),
    "monarch": Monarch(blocks=4),
    "block-diagonal": Block(blocks=4),
    "attention-only": SparseLowRank(rank=4, density=0.1, include=("*.self_attn.*",)),
}


@pytest.fixture(params=RULES)
def converted(request, tiny) -> PreTrainedModel:
    return sparsify(tiny("llama-tied"), RULES[request.param])


def test_every_rule_is_here():
    assert {type(rule) for rule in RULES.values()} == set(NAMED.values())


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


def test_a_saved_model_is_loaded_bit_for_bit(converted, tokens, tmp_path):
    converted.save_pretrained(tmp_path)
    loaded = apical.load(tmp_path)
    assert type(loaded) is type(converted)
    assert repr(loaded) == repr(converted)
    assert torch.equal(logits(loaded, tokens), logits(converted, tokens))
    assert not loaded.training


def test_a_loaded_model_is_saved_as_it_was(converted, tmp_path):
    converted.save_pretrained(tmp_path / "first")
    apical.load(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        first, second = ((tmp_path / n / name).read_bytes() for n in ("first", "second"))
        assert first == second, name


def test_the_config_says_the_rule_and_holds_no_positions(converted, tmp_path):
    converted.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["apical"]["sparse"]
    assert set(entry["modules"]) == set(replaced(converted))
    assert len(entry["rules"]) == 1
    names = converted.state_dict()
    assert not any("positions" in name or "index" in name for name in names)


def test_shards_are_read(tiny, tokens, tmp_path):
    model = sparsify(tiny("qwen2-biases-tied"), RULES["uniform"])
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    assert torch.equal(logits(apical.load(tmp_path), tokens), logits(model, tokens))


def test_options_of_from_pretrained_are_passed_on(tiny, tokens, tmp_path):
    model = sparsify(tiny("llama-tied"), RULES["uniform"])
    model.save_pretrained(tmp_path)
    loaded = apical.load(str(tmp_path), dtype=torch.bfloat16, attn_implementation="eager")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "eager"
    expected = logits(model, tokens)
    # eight bits of mantissa, in three layers
    assert (logits(loaded, tokens) - expected).norm() < 0.1 * expected.norm()


def test_a_loaded_model_generates_and_trains(tiny, tokens, tmp_path):
    model = sparsify(tiny("llama-tied"), RULES["uniform"])
    model.save_pretrained(tmp_path)
    loaded = apical.load(tmp_path)
    made = [m.generate(tokens, max_new_tokens=4, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*made)
    loaded.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_two_rules_one_after_the_other(tiny, tokens, tmp_path):
    model = sparsify(tiny("llama-tied"), SparseLowRank(include=("*.mlp.*",), rank=4, density=0.1))
    sparsify(model, LowRank(include=("*.self_attn.*",), rank=4))
    model.save_pretrained(tmp_path)
    assert [rule["kind"] for rule in model.config.apical["sparse"]["rules"]] == [
        "SparseLowRank",
        "LowRank",
    ]
    assert torch.equal(logits(apical.load(tmp_path), tokens), logits(model, tokens))


def test_explicit_positions_come_from_the_weights(tiny, tokens, tmp_path):
    model = tiny("llama-tied")
    old = model.model.layers[0].mlp.up_proj
    layer = SparseLowRankLinear.from_dense(
        old, rank=4, alpha=1.0, support="explicit", positions=torch.arange(7, 900, 31)
    )
    model.model.layers[0].mlp.up_proj = layer
    sparsify(model, SparseLowRank(include=("*.self_attn.*",), rank=4, density=0.1))
    model.save_pretrained(tmp_path)
    # with another type, which positions must not take
    loaded = apical.load(tmp_path, dtype=torch.float64)
    found = loaded.model.layers[0].mlp.up_proj
    assert torch.equal(found.support.flat(), torch.arange(7, 900, 31))
    assert found.positions.dtype == torch.int32
    assert isinstance(found.support, Support)
    assert torch.equal(logits(apical.load(tmp_path), tokens), logits(model, tokens))


def test_a_stock_directory_is_loaded_too(tiny, tokens, tmp_path):
    model = tiny("llama-tied")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(apical.load(tmp_path), tokens), logits(model, tokens))


def test_transformers_alone_says_that_weights_are_missing(tiny, tmp_path):
    model = sparsify(tiny("llama-tied"), RULES["uniform"])
    model.save_pretrained(tmp_path)
    load: Any = AutoModelForCausalLM.from_pretrained
    _, found = load(tmp_path, output_loading_info=True)
    layers = set(replaced(model))
    assert {name.removesuffix(".weight") for name in found["missing_keys"]} == layers
    assert {name.rpartition(".")[0] for name in found["unexpected_keys"]} == layers


def test_a_converted_part_of_a_larger_model(tiny, tokens, tmp_path):
    model = tiny("llama-tied")
    part = sparsify(tiny("llama-tied").model, SparseLowRank(rank=4, density=0.1))
    model.model = part
    model.tie_weights()
    model.save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match=r"describe\(model\) if a part was converted alone"):
        apical.load(tmp_path / "without")
    assert describe(model) is model
    model.save_pretrained(tmp_path / "with")
    loaded = apical.load(tmp_path / "with")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    (rule,) = loaded.config.apical["sparse"]["rules"]
    assert rule["kind"] == "SparseLowRank"
    assert set(replaced(loaded)) == {f"model.{name}" for name in replaced(part)}


def test_a_larger_model_without_converted_parts_is_not_described(tiny):
    with pytest.raises(ValueError, match="LlamaForCausalLM with 0 replaced layers; expected"):
        describe(tiny("llama-tied"))


def edit(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["apical"]["sparse"]["modules"][LAYER].update(kind="Newer"),
            r"has model\.layers\.1\.mlp\.up_proj of kind 'Newer'; expected one of",
        ),
        (
            lambda c: c["apical"]["sparse"]["modules"].pop(LAYER),
            r"does not hold the model that its config\.json says: model\.layers\.1\.mlp\.up_proj",
        ),
        (
            lambda c: c["apical"]["sparse"]["modules"][LAYER].update(in_features=5),
            r"has a layer model\.layers\.1\.mlp\.up_proj of \(48, 5\), expected \(48, 32\)",
        ),
        (lambda c: c.update(num_hidden_layers=1), r"has a layer .* which is not in the model"),
        (lambda c: c.update(architectures=["Nonesuch"]), "architectures 'Nonesuch'; expected a"),
    ],
    ids=["kind", "module", "shape", "depth", "class"],
)
def test_a_config_that_does_not_fit_is_refused(tiny, tmp_path, change, message):
    sparsify(tiny("llama-tied"), RULES["uniform"]).save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        apical.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_config_that_models_share_stays_stock(tiny):
    model = tiny("llama-tied")
    shared = model.config
    sparsify(model, RULES["uniform"])
    assert "apical" not in shared.to_dict()
    # transformers changes the config of all modules at once
    assert model.model.layers[0].self_attn.config is model.config


def test_growing_a_converted_model_is_refused(tiny, tmp_path):
    model = sparsify(tiny("llama-tied"), RULES["uniform"])
    with pytest.raises(ValueError, match="sparse layers, which cannot grow; export it first"):
        apical.grow(model, apical.Stack(factor=2))
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="apical export-dense SRC OUT"):
        apical.grow_checkpoint(tmp_path / "small", tmp_path / "large", apical.Stack(factor=2))
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    config = AutoConfig.from_pretrained(tmp_path / "small")
    shutil.rmtree(tmp_path / "small")
    with pytest.raises(ValueError, match="cannot grow"):
        architecture_of(config.to_dict())
