"""Monarch products on a CUDA device, against float64; run by bench/gpu.py."""

import pytest
import torch

from apical import MaskedLinear
from apical.kernels.monarch import _triton, monarch_matmul, ops

from .linear_cross_entropy_interpreted import relative
from .monarch_cases import SHAPES, exact, sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

# one rounding of each of two factors, and of the result
ROUNDED = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LARGE = {"tokens": 2049, "runs": 4, "combs": 4, "rank": 64, "run": 256, "comb": 320}


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("name", [*SHAPES, "large"])
def test_product_and_gradients(name: str, dtype: torch.dtype):
    given = sample(**(SHAPES | {"large": LARGE})[name], dtype=dtype)  # pyright: ignore
    grad = torch.randn(len(given.input), given.out_features).to(dtype)
    leaves = [x.cuda().requires_grad_() for x in given if x is not None]
    assert ops.implementation(leaves[0]) is _triton
    out = monarch_matmul(*leaves[:3], bias=leaves[3])
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad.cuda())]
    again = torch.autograd.grad(monarch_matmul(*leaves[:3], bias=leaves[3]), leaves, grad.cuda())
    for ours, twice, truth in zip(found, [found[0], *again], exact(given, grad), strict=True):
        assert relative(ours.cpu(), truth) <= ROUNDED[dtype]
        assert torch.equal(ours, twice)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:.*SparseSemiStructuredTensor is in prototype.*:UserWarning")
def test_semi_structured_products(dtype: torch.dtype):
    layer = MaskedLinear(256, 128, support="nm", dtype=dtype, device="cuda")
    x = torch.randn(64, 256, dtype=dtype, device="cuda")
    got = layer.to_semi_structured()(x)
    assert relative(got, layer.double()(x.double())) <= ROUNDED[dtype]
