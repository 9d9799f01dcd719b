"""Sparse plus low-rank layers on a CUDA device, against float64; run by bench/gpu.py."""

import os
from typing import Any

import pytest
import torch

from apical.kernels.sparse_low_rank import Support, _cuda, _triton, ops, sparse_low_rank

# without it torch refuses products in deterministic mode
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

# rows: made by the library's kernel, with and without rows at multiples of 16 bytes; blocks: tiles
# that are cut, descriptors and pointers, rows of a block below a tile's
SUPPORTS = {
    "uniform": Support("uniform", 520, 392, 0.05, seed=1),
    "uniform-odd": Support("uniform", 515, 389, 0.05, seed=1),
    "grouped": Support("grouped", 520, 392, 0.2, seed=1),
    "grouped-odd": Support("grouped", 515, 389, 0.2, seed=1),
    "grouped-48": Support("grouped", 520, 392, 0.2, seed=1, block=(48, 20)),
    "grouped-large": Support("grouped", 4096, 4096, 0.03, seed=1),
}


def layered(
    support: Support, dtype: torch.dtype, tokens: int, rank: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    n, m = support.out_features, support.in_features
    shapes = (tokens, m), (rank, m), (n, rank), (support.stored,), (n,)
    # a weight about as large as that of a dense layer
    sizes = 1.0, m**-0.5, rank**-0.5, m**-0.5, 1.0
    leaves = [(torch.randn(s) * k).to(dtype) for s, k in zip(shapes, sizes, strict=True)]
    return leaves, torch.randn(tokens, n).to(dtype)


def layer_and_gradients(
    leaves: list[torch.Tensor], grad: torch.Tensor, support: Support, **options: Any
) -> list[torch.Tensor]:
    x, a, b, values, bias = leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = sparse_low_rank(x, a, b, values, support, bias=bias, scale=0.7, **options)
    grads = torch.autograd.grad(out, leaves, grad)
    return [t.detach().cpu().double() for t in (out, *grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SUPPORTS)
def test_sparse_low_rank(name, dtype):
    # several parts of the tokens
    support, tokens = SUPPORTS[name], 8200 if name == "grouped-large" else 1301
    leaves, grad = layered(support, dtype, tokens, 1024 if name == "grouped-large" else 104)
    layout = [int(support.kind == "grouped"), support.out_features, support.in_features]
    layout += support.block
    chosen = ops.implementation(leaves[0].cuda(), layout)
    assert chosen is (_triton if layout[0] else _cuda)
    actual = layer_and_gradients([x.cuda() for x in leaves], grad.cuda(), support)
    wide = [x.double().cuda() for x in leaves]
    exact = layer_and_gradients(wide, grad.double().cuda(), support, impl="reference")
    # hidden or a weight, then the result are rounded
    budget = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for i, (got, want) in enumerate(zip(actual, exact, strict=True)):
        assert (got - want).norm() / want.norm() <= budget, i


@pytest.mark.parametrize("name", ["uniform", "grouped"])
def test_sparse_low_rank_repeats_itself(name):
    leaves, grad = layered(SUPPORTS[name], torch.bfloat16, 1301, 104)
    here, upstream = [x.cuda() for x in leaves], grad.cuda()
    first, second = (layer_and_gradients(here, upstream, SUPPORTS[name]) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["uniform", "uniform-odd", "grouped", "grouped-odd"])
def test_sanitizer_sees_small_layers(name):
    support = SUPPORTS[name]
    leaves, grad = layered(support, torch.bfloat16, 70, 20)
    found = layer_and_gradients([x.cuda() for x in leaves], grad.cuda(), support)
    assert all(x.isfinite().all() for x in found)
