"""The kernels on a CUDA device, against float64 on the CPU; run by bench/gpu.py."""

import pytest
import torch

from apical.kernels._common import native
from apical.kernels.linear_cross_entropy import linear_cross_entropy
from apical.kernels.varlen_attention import varlen_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def gradients(function, *leaves):
    """Return the outputs and the gradients of their sums, on the CPU."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(out.sum(), leaves))]


# a document of one token, an empty one, and one that ends inside a tile
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_varlen_attention(check_error, dtype, causal):
    bounds = torch.tensor([0, 1, 1, 130, 259], dtype=torch.int32)
    q, k, v = (torch.randn(259, heads, 64).to(dtype) for heads in (4, 2, 2))

    def attend(q, k, v):
        return varlen_attention(q, k, v, bounds, causal=causal)

    def define(q, k, v):
        return varlen_attention(q, k, v, bounds, causal=causal, impl="reference")

    actual = gradients(attend, q.cuda(), k.cuda(), v.cuda())
    exact = gradients(define, q.double(), k.double(), v.double())
    plain = gradients(define, q, k, v)
    for name, *three in zip(("out", "dq", "dk", "dv"), actual, exact, plain, strict=True):
        check_error(*three, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy(check_error, dtype):
    x, weight = torch.randn(300, 64).to(dtype), torch.randn(5003, 64).to(dtype)
    target = torch.randint(0, 5003, (300,))
    target[::7] = -100

    def loss(impl):
        def compute(x, weight):
            return linear_cross_entropy(x, weight, target.to(x.device), z_loss=1e-3, impl=impl).loss

        return compute

    actual = gradients(loss("fused"), x.cuda(), weight.cuda())
    exact = gradients(loss("reference"), x.double(), weight.double())
    plain = gradients(loss("reference"), x, weight)
    for name, *three in zip(("loss", "dx", "dw"), actual, exact, plain, strict=True):
        check_error(*three, name)


# V not a multiple of the block, one row, and a row that is ignored
@pytest.mark.parametrize(("rows", "size"), [(1, 5), (3, 513), (17, 5003)])
def test_softmax_pass_equals_the_cpu_pass(rows, size):
    if not native.loaded():
        pytest.skip(native.status()[1])
    logits, target = torch.randn(rows, size) * 10, torch.randint(0, size, (rows,))
    scale = torch.rand(rows)
    scale[-1] = 0.0
    on_gpu = logits.cuda()
    results = torch.ops.apical.softmax_grad_(on_gpu, target.cuda(), scale.cuda(), 1e-3)
    expected = torch.ops.apical.softmax_grad_(logits, target, scale, 1e-3)
    for got, want in zip((on_gpu, *results), (logits, *expected), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-6)
