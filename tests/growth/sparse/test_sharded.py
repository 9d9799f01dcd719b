"""Sparse layers under FSDP: one and two processes over gloo against none, both batches at once."""

import json
import subprocess
import sys
from typing import Any

import pytest

WORKER = """
import copy, json, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
import apical
from apical import LowRank, Masked, MaskedLinear, Monarch, SparseLowRank
from apical.growth.sparse import replaced

rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
rules = {
    "uniform": SparseLowRank(rank=5, density=0.1),
    "grouped": SparseLowRank(rank=5, density=0.25, support="grouped", block=(16, 8)),
    "sltrain": SparseLowRank(rank=5, density=0.1, init="sltrain", recompute_hidden=True),
    "masked": Masked(sparsity=0.7),
    "masked-random": Masked(sparsity=0.7, init="random"),
    "low-rank": LowRank(rank=5),
    "monarch": Monarch(blocks=2),
}

def build(rule):
    torch.manual_seed(1)
    # 34 rows are no multiple of the ranks, nor 17 of them of a byte of the mask
    config = LlamaConfig(vocab_size=61, hidden_size=24, intermediate_size=34, num_hidden_layers=2,
                         num_attention_heads=4, initializer_range=0.3, mlp_bias=True)
    torch.manual_seed(2)
    return apical.sparsify(LlamaForCausalLM(config), rule).train()

def ids(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(61, (2, 9), generator=generator)

def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

def remask(model, optimizer):
    generator = torch.Generator().manual_seed(3)
    for layer in replaced(model).values():
        if isinstance(layer, MaskedLinear):
            shape = layer.out_features, layer.in_features
            layer.set_mask(torch.rand(shape, generator=generator) < 0.5)
            layer.mask_optimizer_state(optimizer)

def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x

results = {}
for case, rule in rules.items():
    stock = build(rule)
    model = copy.deepcopy(stock)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    first, second = adam(stock), adam(model)
    for step in range(3):
        first.zero_grad()
        for other in range(ranks):
            (stock(ids(10 * step + other), labels=ids(10 * step + other)).loss / ranks).backward()
        first.step()
        second.zero_grad()
        model(ids(10 * step + rank), labels=ids(10 * step + rank)).loss.backward()
        second.step()
        if step == 0:
            remask(stock, first)
            remask(model, second)
    sharded = dict(model.named_parameters())
    error = max((whole(sharded[n]) - p).abs().max().item() for n, p in stock.named_parameters())
    layers, zeros = replaced(model), []
    for name, layer in layers.items():
        if isinstance(layer, MaskedLinear):
            zeros.append(whole(layer.weight)[~layer.dense_mask()].abs().max().item())
    try:
        layer.to_dense()
        refused = "no"
    except ValueError as problem:
        refused = str(problem)
    results[case] = {
        "refused": refused,
        "error": error,
        "layers": len(layers),
        "sharded": sum(type(p).__name__ == "DTensor" for p in sharded.values()) / len(sharded),
        "zeros": zeros,
    }
print("RESULTS" + json.dumps(results))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module", params=[1, 2], ids="{} processes".format)
def results(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, by case."""
    store = str(tmp_path_factory.mktemp("store") / "store")
    ranks: int = request.param
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(ranks), store],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors[-3000:]
    return [json.loads(output.partition("RESULTS")[2]) for output, _ in outputs]


CASES = ["uniform", "grouped", "sltrain", "masked", "masked-random", "low-rank", "monarch"]


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_without_shards(results: list[dict[str, Any]], case: str):
    for rank in results:
        found = rank[case]
        assert found["layers"] == 14
        assert found["sharded"] == 1
        assert found["error"] <= 1e-5  # steps are of 1e-2
        assert "is sharded" in found["refused"]
        assert found["zeros"] == ([0.0] * 14 if "masked" in case else [])
