"""The vocabulary in slices on two gloo ranks, against float64 on one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from . import linear_cross_entropy_cases as cases
from .linear_cross_entropy_cases import grad_of, leaf, relative, sample

RANK = """
import sys
import torch
import torch.distributed as dist
from apical import linear_cross_entropy
from apical.kernels._common import labelled_rows

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.set_num_threads(1)
labelled_rows._CHUNK_ROWS = (16, 16)
results = []
for inputs, options, cut, upstream in torch.load(f"{folder}/cases.pt"):
    own = slice(0, cut) if rank == 0 else slice(cut, None)
    mine = {name: t if name in ("input", "target") else t[own] for name, t in inputs.items()}
    leaves = [t.requires_grad_() for name, t in mine.items() if name not in ("target", "weight")]
    group = {"process_group": dist.group.WORLD}
    for again in range(2):
        out = linear_cross_entropy(**mine, **options, **group)
        total = sum((part * grad).sum() for part, grad in zip(out, upstream))
        grads = torch.autograd.grad(total, leaves, retain_graph=True)
        # a retained graph computes its gradients again
        twice = torch.autograd.grad(total, leaves)
        results.append([[t.detach() for t in out], grads, twice])
torch.save(results, f"{folder}/{rank}.pt")
try:
    x, W = torch.ones(3, 2), torch.ones(4 * (1 - rank), 2)
    linear_cross_entropy(x, W, torch.zeros(3).long(), **group)
except ValueError as error:
    print(error)
dist.destroy_process_group()
"""
Case = tuple[dict[str, Tensor], dict[str, Any], int, list[Tensor]]
T, V = 53, 37


def make(seed: int, cut: int, dtype: torch.dtype = torch.float32) -> Case:
    torch.manual_seed(seed)
    x, W, y = sample(T, V, ignored=1.0 if seed == 0 else 0.3)
    options = cases.random_options(seed, T, V)
    inputs = {"input": x.to(dtype), "linear_weight": W.to(dtype), "target": y}
    inputs |= {n: options.pop(n) for n in ("linear_bias", "weight") if n in options}
    parts = [T, T, T] if options["reduction"] == "none" else [()]
    return inputs, options, cut, [torch.randn(shape) for shape in parts]


# slices: one row, unequal, nearly all; seed 0 ignores every token
CASES = [make(seed, (1, 20, 36)[seed % 3]) for seed in range(15)]
CASES += [make(seed, 20, torch.bfloat16) for seed in (3, 4)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[list[Any], list[Any], str]:
    """What each rank found, twice for every case, and what it printed."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.save(CASES, folder / "cases.pt")
    command = [sys.executable, "-W", "error", "-c", RANK, str(folder)]
    running = [
        subprocess.Popen(
            [*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, outputs, strict=True):
        assert process.returncode == 0, errors[-2000:]
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    assert outputs[0][0] == outputs[1][0]
    return first, second, outputs[0][0]


@pytest.mark.parametrize("i", range(len(CASES)))
def test_slices_of_the_vocabulary_give_the_loss_of_the_whole(ranks, i):
    inputs, options, cut, upstream = CASES[i]
    exact = {
        name: tensor if name == "target" else leaf(tensor, torch.float64)
        for name, tensor in inputs.items()
    }
    if "weight" in exact:
        exact["weight"].requires_grad_(False)
    truth = cases.exactly(exact, cases.doubled(options))
    total = sum((p * g.double()).sum() for p, g in zip(truth, upstream, strict=False))
    assert isinstance(total, Tensor)
    leaves = [t for t in exact.values() if t.requires_grad]
    torch.autograd.backward(total, inputs=leaves)
    budget = 3e-6 if inputs["input"].dtype == torch.float32 else 3e-3
    for rank, found in enumerate(ranks[:2]):
        out, grads, twice = found[2 * i]
        for name, a, e in zip(truth._fields, out, truth, strict=True):
            assert a.shape == e.shape
            assert bool((a - e).norm() <= 2e-6 * e.norm() + 1e-7), name
        own = slice(0, cut) if rank == 0 else slice(cut, None)
        for k, (got, again, whole) in enumerate(zip(grads, twice, leaves, strict=True)):
            want = grad_of(whole) if k == 0 else grad_of(whole)[own]
            assert torch.equal(got, again)
            if want.any():
                assert relative(got, want) <= budget
            else:
                assert not got.any()


def test_ranks_and_runs_agree_bit_by_bit(ranks):
    first, second, _ = ranks
    for a, b in zip(first, second, strict=True):
        # outputs and input's gradient
        for one, other in zip((*a[0], a[1][0]), (*b[0], b[1][0]), strict=True):
            assert torch.equal(one, other)
    for run, repeated in zip(first[::2], first[1::2], strict=True):
        for one, other in zip((*run[0], *run[1]), (*repeated[0], *repeated[1]), strict=True):
            assert torch.equal(one, other)


def test_a_rank_without_a_slice_is_named_on_all_ranks(ranks):
    # an error on one rank alone would leave the others waiting
    assert ranks[2].startswith("linear_weight has no rows on rank 1 of process_group")
