"""Bytes and operations against the published tables."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from apical import LowRank, Masked, SparseLowRank, sparsify
from apical.growth.sparse import replaced
from apical.growth.sparse.accounting import SLTRAIN, flops_per_token, index_bytes, memory


def on_meta(config: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("name", "full", "low_rank", "sparse", "int32", "uint8", "products"),
    [
        ("60M", "58.1 0.35", "42.8 0.26", "43.5 0.27", "0.26", "0.26", "0.425"),
        ("130M", "134.1 0.80", "94.0 0.56", "96.5 0.60", "0.59", "0.58", "0.558"),
        ("350M", "368.0 2.21", "185.2 1.11", "194.3 1.24", "1.20", "1.17", "0.426"),
        ("1B", "1339.1 8.03", "609.3 3.66", "645.5 4.16", "4.02", "3.91", "0.426"),
        ("7B", "6738.4 40.43", "2820.9 16.93", "3144.7 21.46", "20.16", "19.19", "0.445"),
    ],
)
def test_sltrains_models(
    name: str, full: str, low_rank: str, sparse: str, int32: str, uint8: str, products: str
):
    published = SLTRAIN[name]
    dense = on_meta(published.config())
    thin = sparsify(on_meta(published.config()), LowRank(rank=published.rank))
    ours = sparsify(on_meta(published.config()), published.rule())

    def row(model: nn.Module, index: float) -> str:
        counted = memory(model)
        return f"{counted.parameters / 1e6:.1f} {counted.training_bytes(index=index) / 1e9:.2f}"

    assert row(dense, 0) == full
    assert row(thin, 0) == low_rank
    assert row(ours, 8) == sparse  # the int64 index of SLTrain's code
    assert row(ours, 4).split()[1] == int32
    assert row(ours, 1).split()[1] == uint8
    layers = replaced(ours).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert f"{sum(layer.flops(1) for layer in layers) / (2 * weights):.3f}" == products


@pytest.mark.parametrize(
    ("name", "ours"),
    [("60M", "0.26"), ("130M", "0.58"), ("350M", "1.17"), ("1B", "3.87"), ("7B", "18.87")],
)
def test_positions_from_a_seed_cost_nothing(name: str, ours: str):
    published = SLTRAIN[name]
    model = sparsify(on_meta(published.config()), published.rule())
    counted = memory(model)
    # two bytes of a weight and two of each moment, for whatever a state dict holds
    state = sum(tensor.numel() for tensor in model.state_dict().values())
    assert counted.training_bytes() == 6 * state
    assert f"{counted.training_bytes() / 1e9:.2f}" == ours


def test_kernels_hold_positions_while_they_run():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    model = sparsify(on_meta(config), SparseLowRank(density=0.1, init="sltrain"))
    stored = memory(model).stored
    assert stored == 2 * (4 * int(0.1 * 32 * 32) + 3 * int(0.1 * 32 * 48))
    # rows and columns, each way, and the order of one in the other: three int32 an entry
    starts = sum(layer.in_features + layer.out_features + 2 for layer in replaced(model).values())
    assert index_bytes(model) == 12 * stored + 4 * starts
    rows = sum(layer.out_features + 1 for layer in replaced(model).values())
    assert index_bytes(model, "cuda") == 4 * stored + 4 * rows
    grouped = SparseLowRank(density=0.5, support="grouped", block=(16, 16), init="sltrain")
    model = sparsify(on_meta(config), grouped)
    assert index_bytes(model) < memory(model).stored / 4  # bytes: blocks have 256 entries


@pytest.mark.parametrize(
    ("sparsity", "speed_up"),
    [(0.5, "1.665"), (0.75, "2.494")],  # the paper's 2.5 times
)
def test_spdfs_gpt3_xl(sparsity: float, speed_up: str):
    # 24 L d^2 (1 - S) + 4 T d L + 2 d V operations a token
    config = GPT2Config(n_embd=2048, n_layer=24, n_head=16, n_positions=2048, vocab_size=50257)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    dense = flops_per_token(model, 2048)
    assert dense == 24 * 24 * 2048**2 + 4 * 2048 * 2048 * 24 + 2 * 2048 * 50257
    sparsify(model, Masked(sparsity=sparsity, init="random"))
    assert f"{dense / flops_per_token(model, 2048):.3f}" == speed_up


def test_operations_of_a_converted_model_are_those_of_its_layers():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, head_dim=16,
    )  # fmt: skip
    model = sparsify(on_meta(config), LowRank(rank=4))
    attention = 4 * 10 * 2 * 4 * 16  # heads wider than the model
    projections = 4 * 2 * 4 * (32 + 64) + 3 * 2 * 4 * (32 + 48)
    assert flops_per_token(model, 10) == attention + 2 * projections + 2 * 32 * 64
