"""The loss against torch.nn.functional.cross_entropy, whose arguments it shares, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from apical import linear_cross_entropy

from .linear_cross_entropy_cases import IGNORE, PASSES, force, grad_of, leaf, relative, sample

T, V = 47, 29
# no option, one, the other, both: torch weighs the smoothed part of a label by class as well
OPTIONS = {
    "plain": {},
    "weight": {"weight": torch.linspace(0, 3, V, dtype=torch.float64)},
    "smoothing": {"label_smoothing": 0.2},
    "both": {"weight": torch.linspace(0, 3, V, dtype=torch.float64), "label_smoothing": 0.2},
}


@pytest.fixture(params=PASSES)
def softmax_pass(request, monkeypatch):
    force(request.param, monkeypatch)


Leaves = tuple[Tensor, Tensor, Tensor]


def ours_of(leaves: Leaves, y: Tensor, options: dict[str, Any]) -> Tensor:
    x, W, bias = leaves
    return linear_cross_entropy(x, W, y, linear_bias=bias, **options).loss


def theirs_of(leaves: Leaves, y: Tensor, options: dict[str, Any]) -> Tensor:
    return F.cross_entropy(F.linear(*leaves), y, **options)


def leaves_of(x: Tensor, W: Tensor, dtype: torch.dtype) -> Leaves:
    return leaf(x, dtype), leaf(W, dtype), leaf(torch.linspace(-1, 1, V), dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_reference_is_torch_in_float64(name, reduction):
    x, W, y = sample(T, V)
    options = {**OPTIONS[name], "reduction": reduction}
    ours, exact = (leaves_of(x, W, torch.float64) for _ in range(2))
    loss = ours_of(ours, y, options | {"impl": "reference"})
    truth = theirs_of(exact, y, options)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-14)
    upstream = torch.randn(truth.shape, dtype=torch.float64)
    loss.backward(upstream)
    truth.backward(upstream)
    for a, e in zip(ours, exact, strict=True):
        torch.testing.assert_close(grad_of(a), grad_of(e), rtol=1e-11, atol=1e-14)


@pytest.mark.usefixtures("softmax_pass")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_fused_is_torch_in_float32(name, reduction):
    x, W, y = sample(T, V)
    options = {**OPTIONS[name], "reduction": reduction}
    ours, exact = leaves_of(x, W, torch.float32), leaves_of(x, W, torch.float64)
    loss = ours_of(ours, y, options)
    truth = theirs_of(exact, y, options)
    assert relative(loss, truth) <= 1e-6
    upstream = torch.randn(truth.shape)
    loss.backward(upstream)
    truth.backward(upstream.double())
    for a, e in zip(ours, exact, strict=True):
        assert relative(grad_of(a), grad_of(e)) <= 2e-6


@pytest.mark.usefixtures("softmax_pass")
@pytest.mark.parametrize("name", OPTIONS)
def test_soft_labels_are_torchs_class_probabilities(name):
    # torch has no ignore_index for these, and its mean divides by the number of tokens
    x, W, _ = sample(T, V)
    y, ids = torch.randint(0, V, (T,)), torch.randint(0, V, (T, 3))
    share = torch.rand(T, 3) / 3
    dense = torch.zeros(T, V, dtype=torch.float64).scatter_add(1, ids, share.double())
    dense = dense.scatter_add(1, y[:, None], 1 - dense.sum(1, keepdim=True))
    ours, exact = leaves_of(x, W, torch.float32), leaves_of(x, W, torch.float64)
    soft = {"soft_ids": ids, "soft_weights": share, "num_items": T}
    loss = ours_of(ours, y, OPTIONS[name] | soft)
    truth = F.cross_entropy(F.linear(*exact), dense, **OPTIONS[name])
    assert relative(loss, truth) <= 1e-6
    loss.backward()
    truth.backward()
    for a, e in zip(ours, exact, strict=True):
        assert relative(grad_of(a), grad_of(e)) <= 2e-6


@pytest.mark.parametrize("ignore_index", [IGNORE, 0, V + 5])
def test_ignore_index_is_torchs(ignore_index):
    x, W, y = sample(T, V, ignored=0.0)
    y[::4] = ignore_index
    loss = linear_cross_entropy(x, W, y, ignore_index=ignore_index).loss
    truth = F.cross_entropy(F.linear(x.double(), W.double()), y, ignore_index=ignore_index)
    assert relative(loss, truth) <= 1e-6


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_is_differentiable_twice_with_every_option(reduction):
    x, W, y = sample(5, 7, H=3)
    inputs = [leaf(t, torch.float64) for t in (x, W, torch.randn(7))]
    options: dict[str, Any] = {
        "weight": torch.rand(7).double() + 0.1,
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": 3.0,
        "logit_scale": 0.7,
        "token_weight": torch.rand(5).double(),
        "soft_ids": torch.randint(0, 7, (5, 2)),
        "soft_weights": torch.rand(5, 2).double() / 2,
    }

    def losses(x: Tensor, W: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out = linear_cross_entropy(
            x, W, y, linear_bias=bias, reduction=reduction, impl="reference", **options
        )
        return out[:3] if reduction == "none" else out[:1]

    assert torch.autograd.gradcheck(losses, inputs)
    assert torch.autograd.gradgradcheck(losses, inputs)
