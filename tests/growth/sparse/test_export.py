"""Converted models become stock ones again, in memory and from directory to directory."""

import json
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

import apical
from apical.growth import checkpoint_output
from apical.growth.sparse import Block, LowRank, Masked, Monarch, SparseLowRank, sparsify
from apical.growth.sparse.export import export_dense_checkpoint
from apical.growth.sparse.layers import SparseLowRankLinear

RULES = {
    "uniform": SparseLowRank(rank=4, density=0.1),
    "grouped": SparseLowRank(rank=4, density=0.25, support="grouped", block=(16, 8)),
    "low-rank": LowRank(rank=4),
    "masked-magnitude": Masked(sparsity=0.75),
    "masked-random": Masked(sparsity=0.75, init="random"),
    "masked-2:4": Masked(support="nm", init="random"),
    "monarch": Monarch(blocks=4),
    "block-diagonal": Block(blocks=4),
}
COLA = LowRank(rank=4, activation="silu", init="cola")


@pytest.fixture
def gpt2() -> PreTrainedModel:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=64)
    config.bos_token_id, config.eos_token_id = 1, 2
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_in_memory(tiny, tokens, rule):
    # in double precision the two ways to compute it agree to its rounding
    model = sparsify(tiny("qwen2-biases-tied", dtype=torch.float64), rule)
    expected = logits(model, tokens)
    assert apical.export_dense(model) is model
    assert relative(logits(model, tokens), expected) < 1e-13
    stock = tiny("qwen2-biases-tied")
    assert repr(model) == repr(stock)
    assert "apical" not in model.config.to_dict()
    assert list(model.state_dict()) == list(stock.state_dict())


def test_modes_and_frozen_weights_are_kept(tiny):
    model = tiny("llama-tied").train()
    model.model.layers[1].requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    apical.export_dense(sparsify(model, RULES["uniform"]))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(module.training for module in model.modules())


def test_transposed_layers_come_back(gpt2, tokens):
    model = sparsify(gpt2, RULES["uniform"])
    expected = logits(model, tokens)
    exported = apical.export_dense(model)
    assert isinstance(exported.transformer.h[0].attn.c_attn, Conv1D)
    # two float32 orders of summation, two layers
    assert relative(logits(exported, tokens), expected) < 1e-5


class Shared(torch.nn.Module):
    """One layer in two places, outside transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
        self.again = self.blocks[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.blocks[0](x))


def test_a_model_without_a_config():
    model, x = Shared(), torch.randn(3, 8)
    with torch.no_grad():
        converted = sparsify(model, LowRank(rank=2))(x)
        exported = apical.export_dense(model)
        assert type(exported.again) is torch.nn.Linear
        assert exported.again is exported.blocks[0]
        assert relative(exported(x), converted) < 1e-5


def test_what_is_not_linear_is_refused_and_changes_nothing(tiny):
    model = sparsify(tiny("llama-tied"), LowRank(rank=4, include=("*.mlp.*",)))
    sparsify(model, LowRank(rank=4, activation="silu", init="cola", include=("*.self_attn.*",)))
    before = repr(model)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.\w+: .*activation="):
        apical.export_dense(model)
    assert repr(model) == before
    with pytest.raises(ValueError, match="no sparse layers to export"):
        apical.export_dense(tiny("llama-tied"))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("limit", [10**9, 10_000], ids=["one-file", "shards"])
def test_directory_to_directory(tiny, tokens, tmp_path, rule, limit):
    model = sparsify(tiny("qwen2-biases-tied"), rule)
    model.save_pretrained(tmp_path / "sparse", max_shard_size="8KB")
    count = export_dense_checkpoint(tmp_path / "sparse", tmp_path / "out", max_shard_bytes=limit)
    assert count == 3 * 7
    assert len([*(tmp_path / "out").glob("*.safetensors")]) == 1 or limit < 10**9
    load: Any = AutoModelForCausalLM.from_pretrained
    loaded, found = load(tmp_path / "out", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    exported = apical.export_dense(model)
    for name, weight in exported.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert torch.equal(logits(loaded, tokens), logits(exported, tokens))


def test_transposed_layers_of_a_directory(gpt2, tokens, tmp_path):
    model = sparsify(gpt2, RULES["uniform"])
    model.save_pretrained(tmp_path / "sparse")
    export_dense_checkpoint(tmp_path / "sparse", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(logits(loaded, tokens), logits(model, tokens)) < 1e-5


def test_explicit_positions_and_bfloat16(tiny, tokens, tmp_path):
    model = tiny("llama-tied", dtype=torch.bfloat16)
    old = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = SparseLowRankLinear.from_dense(
        old, rank=4, alpha=1.0, support="explicit", positions=torch.arange(7, 900, 31)
    )
    sparsify(model, SparseLowRank(include=("*.self_attn.*",), rank=4, density=0.1))
    model.save_pretrained(tmp_path / "sparse")
    export_dense_checkpoint(tmp_path / "sparse", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = apical.export_dense(model).state_dict()
    assert all(torch.equal(w, expected[name]) for name, w in loaded.state_dict().items())
    assert loaded.dtype == torch.bfloat16


def test_what_else_belongs_to_a_checkpoint_is_copied(tiny, tmp_path):
    model = sparsify(tiny("llama-tied"), RULES["uniform"])
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "sparse")
    (tmp_path / "sparse" / "tokenizer_config.json").write_text('{"a": 1}')
    (tmp_path / "sparse" / "optimizer.pt").write_text("not of a model")
    export_dense_checkpoint(tmp_path / "sparse", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.max_new_tokens == 7
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"a": 1}'
    assert not (tmp_path / "out" / "optimizer.pt").exists()


def test_mistakes_leave_nothing(tiny, tmp_path, monkeypatch):
    tiny("llama-tied").save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="no sparse layers to export"):
        export_dense_checkpoint(tmp_path / "stock", tmp_path / "out")
    with pytest.raises(FileExistsError, match="is not overwritten"):
        export_dense_checkpoint(tmp_path / "stock", tmp_path / "stock")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        export_dense_checkpoint(tmp_path / "nothing", tmp_path / "out")
    sparsify(tiny("llama-tied"), COLA).save_pretrained(tmp_path / "cola")
    with pytest.raises(ValueError, match="activation="):
        export_dense_checkpoint(tmp_path / "cola", tmp_path / "out")
    sparsify(tiny("llama-tied"), RULES["uniform"]).save_pretrained(tmp_path / "sparse")

    def interrupt(source, out):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_output, "copy_others", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_dense_checkpoint(tmp_path / "sparse", tmp_path / "out")
    assert not [name for name in tmp_path.iterdir() if name.name.startswith("out")]


def test_a_checkpoint_without_a_tensor_of_a_layer(tiny, tmp_path):
    sparsify(tiny("llama-tied"), RULES["uniform"]).save_pretrained(tmp_path / "sparse")
    path = tmp_path / "sparse" / "config.json"
    config = json.loads(path.read_text())
    modules = config["apical"]["sparse"]["modules"]
    modules["model.norm"] = modules.pop("model.layers.0.mlp.up_proj")
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.norm\.a is not in the checkpoint"):
        export_dense_checkpoint(tmp_path / "sparse", tmp_path / "out")
