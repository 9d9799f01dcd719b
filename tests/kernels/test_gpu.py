"""The kernels on a CUDA device, against float64 on the CPU; run by bench/gpu.py."""

from typing import Any

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


# a document of one token, an empty one, one that ends inside a tile, and a long one
BOUNDS = torch.tensor([0, 1, 1, 130, 259, 700], dtype=torch.int32)
# keys: fewer, none, more, and many more than queries
BOUNDS_K = torch.tensor([0, 3, 3, 60, 259, 1200], dtype=torch.int32)
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (70, 0)},
    "two-sided": {"window_size": (5, 66)},
    "softcap": {"softcap": 3.0, "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0])},
    "sinks": {"sinks": torch.tensor([1.0, -2.0, 0.0, 4.0]), "causal": True},
    "dropout": {"dropout_p": 0.2, "dropout_seed": torch.tensor([2**40 + 7])},
    "global": {"causal": True, "window_size": (30, 0), "global_tokens": 5},
    "softplus": {"weights": "softplus", "causal": True},
    "re-weighted": {"weights": "softplus", "reweight": (3.0, 0.5), "causal": True},
}


def attended(leaves: list[torch.Tensor], *, impl: str, **options: Any) -> list[torch.Tensor]:
    """Return the result, lse and all gradients of a scalar that depends on both, on the CPU."""
    q, k, v = leaves = [x.detach().requires_grad_() for x in leaves]
    options = {
        name: value.to(q.device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    if "sinks" in options:
        options["sinks"] = options["sinks"].requires_grad_()
        leaves.append(options["sinks"])
    cu_q, cu_k = BOUNDS.to(q.device), BOUNDS_K.to(q.device)
    out, lse = varlen_attention(q, k, v, cu_q, cu_k, impl=impl, return_lse=True, **options)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    weight = torch.linspace(-1, 1, out.shape[2], device=q.device, dtype=out.dtype)
    grads = torch.autograd.grad((out * weight).sum() + finite.square().sum(), leaves)
    return [x.detach().cpu() for x in (out, finite, *grads)]


# head sizes: of two blocks, no power of two, and values of another size than keys
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (40, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_varlen_attention(check_error, dtype, option, size):
    # tokens after the last boundary
    q = torch.randn(703, 4, size[0]).to(dtype)
    k, v = (torch.randn(1210, 2, channels).to(dtype) for channels in size)
    actual = attended([q.cuda(), k.cuda(), v.cuda()], impl="fused", **OPTIONS[option])
    wide = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value for name, value in OPTIONS[option].items()
    }  # fmt: skip
    exact = attended([q.double(), k.double(), v.double()], impl="reference", **wide)
    plain = attended([q, k, v], impl="reference", **OPTIONS[option])
    for name, *three in zip(
        ("out", "lse", "dq", "dk", "dv", "dsinks"), actual, exact, plain, strict=False
    ):
        three[2] = three[2].to(three[0].dtype)
        check_error(*three, name)


@pytest.mark.parametrize("causal", [False, True])
def test_sanitizer_sees_small_attention(causal):
    q, k, v = (torch.randn(703, heads, 64).bfloat16().cuda() for heads in (4, 2, 2))
    leaves = q, k, v = [x.requires_grad_() for x in (q, k, v)]
    out = varlen_attention(q, k, v, BOUNDS.cuda(), causal=causal)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().square().sum(), leaves))


def test_neighbours_and_repetition_change_no_bit():
    q, k, v = (torch.randn(700, heads, 64).bfloat16().cuda() for heads in (4, 2, 2))
    runs = []
    for poison in (0.0, float("nan"), 1e30):
        for x in (q, k, v):
            x[130:259] = poison
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = varlen_attention(leaves[0], leaves[1], leaves[2], BOUNDS.cuda(), causal=True)
        grads = torch.autograd.grad(out[259:].float().square().sum(), leaves)
        runs.append([out.detach()[259:], *(g[259:] for g in grads)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_huge_strides_do_not_overflow():
    # token 1 of the second document lies beyond 2 ** 31 elements
    stride = 2**31 // 300
    storage = torch.zeros(stride * 400, dtype=torch.bfloat16, device="cuda")
    x = storage.as_strided((400, 1, 64), (stride, 64, 1))
    x.copy_(torch.randn(400, 1, 64))
    near = x.contiguous()
    bounds = torch.tensor([0, 100, 400], dtype=torch.int32, device="cuda")
    got, want = (
        varlen_attention(y, y.view_as(y), y.view_as(y), bounds, causal=True) for y in (x, near)
    )
    assert torch.equal(got, want)


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
