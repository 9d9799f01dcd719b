"""Growing a model under FSDP: two processes over gloo against none."""

import json
import subprocess
import sys

import pytest

WORKER = """
import json, sys, weakref
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM
import apical
from apical.growth.operators import Stack, Widen

rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
# 5 heads and 17 directions are no multiple of the ranks
sizes = dict(vocab_size=61, hidden_size=40, num_hidden_layers=2, num_attention_heads=5,
             num_key_value_heads=5, intermediate_size=17)
families = {
    "tied": dict(model_type="llama", tie_word_embeddings=True),
    "experts": dict(model_type="mixtral", num_local_experts=3, num_experts_per_tok=2),
}

def build(family):
    torch.manual_seed(1)
    config = AutoConfig.for_model(**(sizes | families[family]))
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).eval()

def shard(model):
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)

alive, peak = [0], [0]
gather = DTensor.full_tensor

def forget(count):
    alive[0] -= count

def watched(self, **rest):
    found = gather(self, **rest)
    alive[0] += found.numel()
    peak[0] = max(peak[0], alive[0])
    weakref.finalize(found, forget, found.numel())
    return found

DTensor.full_tensor = watched

ids = torch.arange(22).mul(7).remainder(61).view(2, 11)
results = {}
for family in families:
    for name, operator in (("wider", Widen()), ("deeper", Stack())):
        stock = build(family)
        expected = apical.grow(stock, operator)
        stock.model.norm.requires_grad_(False)
        shard(stock)
        peak[0] = 0
        grown = apical.grow(stock, operator, shard=shard)
        biggest = max(p.numel() for p in stock.parameters())
        parameters = dict(grown.named_parameters())
        with torch.no_grad():
            error = (grown(ids).logits - expected(ids).logits).abs().max().item()
        frozen = [n for n, p in parameters.items() if not p.requires_grad]
        grown.train()(ids, labels=ids).loss.backward()
        results[f"{family}, {name}"] = {
            "error": error,
            "frozen": frozen,
            "gathered": peak[0] / biggest,
            "local": sum(p.to_local().numel() for p in parameters.values()),
            "all": sum(p.numel() for p in expected.parameters()),
            "equal": all(torch.equal(gather(parameters[n]), p)
                         for n, p in expected.named_parameters()),
            "gradients": all(p.grad is not None for p in parameters.values() if p.requires_grad),
        }
try:
    apical.grow(stock, Stack())
    results["refused"] = ""
except ValueError as problem:
    results["refused"] = str(problem)
print("RESULTS" + json.dumps(results))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two ranks found, by case."""
    store = str(tmp_path_factory.mktemp("store") / "store")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), "2", store],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors[-3000:]
    return [json.loads(output.partition("RESULTS")[2]) for output, _ in outputs]


@pytest.mark.parametrize(
    "case", ["tied, wider", "tied, deeper", "experts, wider", "experts, deeper"]
)
def test_a_sharded_model_grows_into_the_same_one_in_shards(results, case):
    for rank in (rank[case] for rank in results):
        assert rank["equal"]
        assert rank["error"] <= 1e-6
        assert rank["frozen"] == ["model.norm.weight"]
        assert rank["gradients"]
        # of the largest parameter: the one just gathered and the two before it, not the model's 14
        assert 1 <= rank["gathered"] <= 3
    total = results[0][case]["all"]
    assert sum(rank[case]["local"] for rank in results) == total
    assert all(rank[case]["local"] < 0.6 * total for rank in results)


def test_a_sharded_model_needs_to_be_told_how(results):
    assert "model and shard disagree" in results[0]["refused"]
