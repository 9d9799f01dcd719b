"""Conversion of models: which layers, with which seeds, and what is refused."""

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import apical
from apical import LowRank, LowRankLinear, SparseLowRank, SparseLowRankLinear, sparsify
from apical.growth.sparse import Rule, replaced
from apical.growth.sparse.convert import layer_seed

TOKENS = torch.arange(2 * 12).mul(7).remainder(64).view(2, 12)  # (B, S)
LLAMA = {
    f"model.layers.{i}.{name}"
    for i in range(2)
    for name in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
}
GPT2 = {
    f"transformer.h.{i}.{name}"
    for i in range(2)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
}


def llama(**changes: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes)))  # pyright: ignore


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], set[str]]] = {
    "llama": (llama, LLAMA),
    "llama-tied": (lambda: llama(tie_word_embeddings=True), LLAMA),
    "gpt2": (gpt2, GPT2),  # Conv1D, head tied to the embedding
}


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_in_the_blocks_is_replaced_and_nothing_else(name: str):
    build, names = MODELS[name]
    model = build()
    head, others = model.get_output_embeddings(), {*dict(model.named_modules())} - names
    assert sparsify(model, SparseLowRank(rank=0.25, density=0.1)) is model
    assert set(replaced(model)) == names
    assert {type(layer) for layer in replaced(model).values()} == {SparseLowRankLinear}
    assert {*dict(model.named_modules())} - names == others
    assert model.get_output_embeddings() is head


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(SparseLowRank(rank=1.0, density=0.1), id="sparse-low-rank"),
        pytest.param(LowRank(rank=1.0), id="low-rank"),
    ],
)
def test_at_full_rank_the_model_computes_the_same(name: str, rule: Rule):
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
        after = sparsify(model, rule)(input_ids=TOKENS).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(SparseLowRank(rank=8, density=0.1, init="sltrain"), id="sltrain"),
        pytest.param(
            SparseLowRank(rank=8, density=0.5, support="grouped", block=(16, 8)), id="grouped"
        ),
        pytest.param(LowRank(rank=8, activation="silu", init="cola"), id="cola"),
        pytest.param(LowRank(), id="pela"),
    ],
)
def test_a_converted_model_learns_a_batch(name: str, rule: Rule):
    model = sparsify(MODELS[name][0](), rule).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5  # nats; it starts near log 64 = 4.2
    assert all(p.grad is not None for layer in replaced(model).values() for p in layer.parameters())


def test_include_and_exclude_choose_by_name():
    model = sparsify(llama(), LowRank(include=("*.mlp.*",), exclude=("*.1.mlp.up_proj",)))
    assert set(replaced(model)) == {n for n in LLAMA if ".mlp." in n} - {
        "model.layers.1.mlp.up_proj"
    }
    # what is left may follow by another rule
    sparsify(model, SparseLowRank(exclude=("*.mlp.*",)))
    kinds = {name: type(layer) for name, layer in replaced(model).items()}
    assert kinds["model.layers.1.self_attn.q_proj"] is SparseLowRankLinear
    assert kinds["model.layers.0.mlp.up_proj"] is LowRankLinear


def test_include_reaches_layers_outside_of_blocks():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    sparsify(model, LowRank(include=("0",)))
    assert set(replaced(model)) == {"0"}


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0.25, {8, 4}),  # of min(n, m): 32, and 16 for keys and values
        (0.01, {1}),  # never 0
        (3, {3}),
    ],
)
def test_rank_is_a_share_or_a_number(rank: float, expected: set[int]):
    for rule in (SparseLowRank(rank=rank, density=0.1), LowRank(rank=rank)):
        layers = replaced(sparsify(llama(), rule)).values()
        assert {layer.settings()["rank"] for layer in layers} == expected


def test_layers_have_seeds_of_their_own_that_never_change():
    # the numbers are part of the format: a checkpoint holds no positions
    assert layer_seed(0, "model.layers.0.self_attn.q_proj") == 2934556070423041679
    first = replaced(sparsify(llama(), SparseLowRank(density=0.1)))
    again = replaced(sparsify(llama(), SparseLowRank(density=0.1)))
    other = replaced(sparsify(llama(), SparseLowRank(density=0.1, seed=1)))
    seeds = {name: layer.settings()["seed"] for name, layer in first.items()}
    assert seeds == {name: layer_seed(0, name) for name in LLAMA}
    assert len(set(seeds.values())) == len(seeds)
    assert seeds == {name: layer.settings()["seed"] for name, layer in again.items()}
    assert seeds.keys() == other.keys()
    assert not set(seeds.values()) & {layer.settings()["seed"] for layer in other.values()}


def test_dtype_training_and_mode_are_kept():
    model = llama().bfloat16().eval()
    frozen = model.model.layers[0]
    frozen.requires_grad_(False)
    sparsify(model, SparseLowRank(density=0.1))
    for name, layer in replaced(model).items():
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
        assert {p.requires_grad for p in layer.parameters()} == {"layers.0" not in name}
        assert not layer.training


def test_on_meta_nothing_is_allocated():
    with torch.device("meta"):
        model = llama(hidden_size=4096, intermediate_size=11008)
    sparsify(model, SparseLowRank())
    assert set(replaced(model)) == LLAMA
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_layer_in_several_places_stays_one():
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, num_attention_heads=4,
        intermediate_size=48, num_hidden_layers=2,
    )  # fmt: skip
    model = nn.Module()
    model.blocks = nn.ModuleList([AlbertModel(config).encoder] * 2)
    sparsify(model, LowRank(include=("*.ffn",)))
    first, second = replaced(model).values()
    assert first is second


def test_a_copy_of_a_converted_model_is_converted():
    model = sparsify(llama(), SparseLowRank(density=0.1)).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(other(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}
    assert not shared


def test_what_was_replaced_is_logged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="apical.growth.sparse.convert"):
        sparsify(llama(), LowRank(rank=8, include=("*_proj",), exclude=("*attn*",)))
    stored, dense = 8 * (32 + 48), 32 * 48
    assert caplog.messages == [
        f"6 linear layers hold {stored / dense:.3f} of their dense weights: "
        "model.layers.*.mlp.gate_proj (2), model.layers.*.mlp.up_proj (2), "
        "model.layers.*.mlp.down_proj (2)"
    ]


def tied_in_blocks() -> nn.Module:
    model = llama()
    layers: Any = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    return model


def with_hook() -> nn.Module:
    model = llama()
    model.get_submodule("model.layers.1.mlp.up_proj").register_forward_hook(lambda *_: None)
    return model


def not_finite() -> nn.Module:
    model = llama()
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = torch.nan
    return model


def other_parameter() -> nn.Module:
    class Sharded(nn.Parameter):
        pass

    model = llama()
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.weight = Sharded(torch.zeros(48, 32))
    return model


@pytest.mark.parametrize(
    ("build", "rule", "message"),
    [
        (
            llama,
            LowRank(include=("*.q_porj",)),
            r"include has '\*\.q_porj', which matches no linear layer; its linear layers are "
            r"model\.layers\.\*\.self_attn\.q_proj, model\.layers\.\*\.self_attn\.k_proj, ",
        ),
        (llama, LowRank(include=("lm_head",)), "include has 'lm_head', which matches no linear"),
        (
            llama,
            LowRank(exclude=("attention",)),
            "exclude has 'attention', which matches no module",
        ),
        (
            llama,
            LowRank(exclude=("model.*",)),
            "no linear layer is in a repeated block and not excluded; its linear layers are model",
        ),
        (
            lambda: nn.Embedding(3, 3),
            LowRank(),
            "no linear layer .*; the model has no nn.Linear or Conv1D but its output head",
        ),
        (
            llama,
            LowRank(rank=17),
            r"model\.layers\.0\.self_attn\.k_proj: rank is 17; expected an integer in 1 \.\. 16",
        ),
        (
            llama,
            SparseLowRank(density=0.0001),
            r"model\.layers\.0\.self_attn\.q_proj: density 0\.0001 stores no entry",
        ),
        (
            llama,
            SparseLowRank(support="nm"),
            r"q_proj: nm with block=\(2, 4\) has density 0\.5, not 0\.03; pass that",
        ),
        (llama, LowRank(rank=1.5), r"q_proj: rank is 1\.5; expected a share above 0 and at most 1"),
        (
            tied_in_blocks,
            LowRank(),
            r"layers\.0\.mlp\.up_proj shares its weight with model\.layers\.1\.mlp\.up_proj; "
            "exclude it, or untie them",
        ),
        (with_hook, LowRank(), r"layers\.1\.mlp\.up_proj has hooks, which would be lost; remove"),
        (not_finite, LowRank(), r"layers\.1\.mlp\.up_proj has a weight with NaN or infinite"),
        (other_parameter, LowRank(), r"up_proj has a Sharded as a parameter; call sparsify before"),
        (
            lambda: sparsify(llama(), LowRank(include=("*.1.*.up_proj",))),
            LowRank(),
            r"layers\.1\.mlp\.up_proj is already a LowRankLinear; exclude it, or start from",
        ),
        (llama, LowRank, "rule is a type; expected one such as apical.SparseLowRank()"),
    ],
)
def test_refused_and_left_as_it_was(build: Callable[[], nn.Module], rule: Any, message: str):
    model = build()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        sparsify(model, rule)
    assert dict(model.named_modules()) == before


def test_rules_are_values():
    rule = SparseLowRank(include=("*.mlp.*",), block=(16, 8), support="grouped", density=0.5)
    settings = json.loads(json.dumps(asdict(rule)))
    assert SparseLowRank(**settings) == rule
    with pytest.raises(ValueError, match=r"include is the text '\*\.mlp\.\*'; expected a tuple"):
        LowRank(include="*.mlp.*")  # pyright: ignore


def test_names_are_public():
    for name in ("LowRank", "LowRankLinear", "SparseLowRank", "SparseLowRankLinear", "sparsify"):
        assert name in apical.__all__
        assert getattr(apical, name).__name__ == name
