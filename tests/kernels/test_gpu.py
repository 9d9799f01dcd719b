"""The kernels on a CUDA device, against float64 on the CPU; run by bench/gpu.py."""

from typing import Any

import pytest
import torch

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


# every option alone, and all that go together
LOSSES = {
    "plain": {},
    "bias": {"bias": True},
    "z-loss": {"z_loss": 1e-3, "logit_scale": 0.5},
    "smoothing": {"label_smoothing": 0.1, "classes": True},
    "softcap": {"softcap": 5.0},
    "soft-labels": {"soft": True},
    "all": {
        "bias": True, "z_loss": 1e-3, "logit_scale": 0.5, "label_smoothing": 0.1,
        "classes": True, "softcap": 5.0, "soft": True,
    },
}  # fmt: skip


# rows of the last are at no multiple of 16 bytes
@pytest.mark.parametrize(("option", "hidden"), [*((name, 320) for name in LOSSES), ("all", 39)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_linear_cross_entropy_options(option, dtype, reduction, hidden):
    T, V = 1300, 5003
    options = dict(LOSSES[option])
    x, w = torch.randn(T, hidden).to(dtype), (torch.randn(V, hidden) * hidden**-0.5).to(dtype)
    bias = torch.randn(V).to(dtype) if options.pop("bias", False) else None
    tensors = {"weight": torch.rand(V)} if options.pop("classes", False) else {}
    if options.pop("soft", False):
        tensors["soft_ids"] = torch.randint(0, V, (T, 3))
        tensors["soft_weights"] = torch.rand(T, 3) / 6
    target = torch.randint(0, V, (T,))
    target[::3] = -100
    upstream = torch.rand(T, dtype=torch.float64) if reduction == "none" else None

    def computed(device, impl, wide):
        leaves: list[Any] = [
            t if t is None else t.to(device, wide).requires_grad_() for t in (x, w, bias)
        ]
        named = {
            name: t.to(device, torch.float64 if impl == "reference" else t.dtype)
            if t.is_floating_point() else t.to(device) for name, t in tensors.items()
        }  # fmt: skip
        out = linear_cross_entropy(
            leaves[0], leaves[1], target.to(device), linear_bias=leaves[2], reduction=reduction,
            impl=impl, **named, **options,
        )  # fmt: skip
        loss = out.loss if upstream is None else (out.loss * upstream.to(out.loss)).sum()
        present = [leaf for leaf in leaves if leaf is not None]
        rest = (out.loss, out.nll, out.lse, out.entropy)
        return [t.detach().cpu().double() for t in (*rest, *torch.autograd.grad(loss, present))]

    actual = computed("cuda", "fused", dtype)
    exact = computed("cpu", "reference", torch.float64)
    # exponentials, and x times their factors, keep 8 bits in bfloat16
    grads = 4e-3 if dtype == torch.bfloat16 else 1e-3
    for i, (got, want) in enumerate(zip(actual, exact, strict=True)):
        assert (got - want).norm() / want.norm() <= (1e-5 if i < 4 else grads), i


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_filtered_linear_cross_entropy(dtype):
    T, H, V = 1300, 320, 5003
    w = (torch.randn(V, H) * H**-0.5).to(dtype)
    # labels in the first tiles of classes: in all others softmax is exp(-13) or so
    target = torch.arange(T) % 500
    target[::3] = -100
    x = torch.where(target[:, None] < 0, torch.nan, w[target.clamp(min=0)] * 13).to(dtype)

    def computed(impl, device="cuda", wide=dtype):
        leaves = [t.to(device, wide).requires_grad_() for t in (x, w)]
        out = linear_cross_entropy(
            leaves[0], leaves[1], target.to(device), reduction="sum", impl=impl
        )
        grads = torch.autograd.grad(out.loss, leaves)
        return [t.detach().cpu() for t in (out.loss, out.nll, out.lse, out.entropy, *grads)]

    once, again, fused = (computed(impl) for impl in ("filtered", "filtered", "fused"))
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))
    assert all(torch.equal(*pair) for pair in zip(once[:4], fused[:4], strict=True))
    assert not torch.equal(once[5], fused[5])
    exact = computed("reference", "cpu", torch.float64)[4:]
    rows, least = target >= 0, torch.finfo(dtype).eps / 32
    sides = w.double().norm(dim=1).sum(), x[rows].double().norm(dim=1).sum()
    for got, want, side in zip(once[4:], exact, sides, strict=True):
        # the bound of the README, and the budget of what is stored
        lost = (got.double() - want).norm(dim=1)
        assert (lost <= least * side + 4e-3 * want.norm(dim=1).max()).all()


def test_linear_cross_entropy_repeats_itself_and_leaves_its_range():
    x, w = torch.randn(2500, 256).bfloat16().cuda(), torch.randn(5003, 256).bfloat16().cuda()
    target = torch.randint(0, 5003, (2500,))
    found = []
    for _ in range(2):
        a, b = leaves = [t.detach().requires_grad_() for t in (x * 20, w)]
        # losses of hundreds: rows are centred at their maximum
        loss = linear_cross_entropy(a, b, target.cuda()).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    a, b = wide = [(x * 20).cpu().double().requires_grad_(), w.cpu().double().requires_grad_()]
    exact = linear_cross_entropy(a, b, target, impl="reference").loss
    assert exact > 300
    assert abs(found[0][0].item() / exact.item() - 1) < 1e-5
    for got, want in zip(found[0][1:], torch.autograd.grad(exact, wide), strict=True):
        assert (got.cpu().double() - want).norm() / want.norm() < 4e-3


def test_sanitizer_sees_small_losses():
    x, w = torch.randn(130, 64).bfloat16().cuda(), torch.randn(513, 64).bfloat16().cuda()
    target = torch.randint(0, 513, (130,)).cuda()
    target[::5] = -100
    for reduction, impl in (("mean", "fused"), ("none", "fused"), ("mean", "filtered")):
        a, b = leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
        loss = linear_cross_entropy(a, b, target, reduction=reduction, impl=impl).loss
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), leaves))
