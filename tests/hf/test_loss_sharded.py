"""The fused loss under FSDP: two processes over gloo against one process with both batches."""

import json
import subprocess
import sys

import pytest

WORKER = """
import copy, json, sys
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from apical.hf import use_kernels

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
shape = dict(vocab_size=63, pad_token_id=0, hidden_size=32, intermediate_size=48,
             num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=32,
             initializer_range=0.3)

def build(family, **options):
    # 63 words are no multiple of the ranks
    torch.manual_seed(1)
    config = getattr(transformers, family + "Config")(**shape, **options)
    suffix = "ForMaskedLM" if family == "Bert" else "ForCausalLM"
    return getattr(transformers, family + suffix)(config).train()

def ids(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(3, 63, (2, 12), generator=generator)

class Gathers(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "c10d._allgather_base_" in str(func)
        return func(*args, **(kwargs or {}))

cap = dict(num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0)
still = dict(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
cases = {
    "root": ("Llama", {}, None),
    "root, tied": ("Gemma2", cap, None),
    "root, bias": ("Bert", still, None),
    "alone": ("Llama", {}, True),
    "alone, cap": ("Gemma2", cap | dict(tie_word_embeddings=False), True),
    "alone, kept": ("Gemma2", cap | dict(tie_word_embeddings=False), False),
}
results = {}
for case, (family, options, reshard) in cases.items():
    stock = build(family, **options)
    for batch in (0, 1):
        (stock(ids(batch), labels=ids(batch)).loss / 2).backward()
    expected = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    largest = max(grad.abs().max() for grad in expected.values())
    loss = stock(ids(rank), labels=ids(rank)).loss
    for first in ("kernels", "shards"):
        model = build(family, **options)
        if first == "kernels":
            use_kernels(model, attention=False)
        if reshard is not None:
            fully_shard(model.get_output_embeddings(), reshard_after_forward=reshard)
        fully_shard(model)
        if first == "shards":
            use_kernels(model, attention=False)
        sharded = type(model.get_output_embeddings().weight).__name__
        # the second step must find what the first left
        for _ in range(2):
            model.zero_grad()
            with Gathers() as gathers:
                out = model(ids(rank), labels=ids(rank))
                out.loss.backward()
        errors = [
            ((p.grad.full_tensor() - expected[name]).abs().max() / largest).item()
            for name, p in model.named_parameters()
            if name in expected
        ]
        results[f"{case}, {first} first"] = {
            "loss": abs(out.loss.item() / loss.item() - 1),
            "gradients": max(errors),
            "fused": out.get("logits") is None,
            "weight": sharded,
            "gathers": gathers.count,
        }
print("RESULTS" + json.dumps(results))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what each rank found, by case."""
    store = str(tmp_path_factory.mktemp("store") / "store")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), store],
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
        assert worker.returncode == 0, errors[-2000:]
    return [json.loads(output.partition("RESULTS")[2]) for output, _ in outputs]


CASES = ["root", "root, tied", "root, bias", "alone", "alone, cap", "alone, kept"]


@pytest.mark.parametrize("first", ["kernels", "shards"])
@pytest.mark.parametrize("case", CASES)
def test_step_equals_the_unsharded_mean(results, case, first):
    for rank in results:
        found = rank[f"{case}, {first} first"]
        assert found["weight"] == "DTensor"
        assert found["fused"]
        assert found["loss"] <= 1e-6
        assert found["gradients"] <= 1e-5


def test_a_head_that_is_kept_is_gathered_once(results):
    for rank in results:
        for first in ("kernels", "shards"):
            # with everything else in the other group
            assert rank[f"root, {first} first"]["gathers"] == 1
            assert rank[f"alone, kept, {first} first"]["gathers"] == 2
            # before the model's own call, before the loss, before the backward
            assert rank[f"alone, {first} first"]["gathers"] == 1 + 3
