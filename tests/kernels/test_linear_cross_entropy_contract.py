"""What the fused loss accepts, refuses and returns; its accuracy is in the file beside this."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from apical import LinearCrossEntropyOutput, linear_cross_entropy
from apical.kernels._common import native
from apical.kernels.linear_cross_entropy import ops

chunked = importlib.import_module("apical.kernels.linear_cross_entropy._chunked")

IGNORE = -100


@pytest.fixture(params=["native", "torch"])
def softmax_pass(request, monkeypatch):
    """Both passes over a chunk: the C++ library's, and the one for machines without it."""
    if request.param == "torch":
        monkeypatch.setattr(chunked, "_has_native", lambda device: False)
    elif not native.loaded():
        pytest.skip(native.status()[1])
    return request.param


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def sample(T: int, V: int, H: int = 24, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    target = torch.randint(0, V, (T,))
    target[torch.rand(T) < ignored] = IGNORE
    return torch.randn(T, H), torch.randn(V, H) * H**-0.5, target


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@pytest.mark.usefixtures("softmax_pass")
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_zero(reduction, impl):
    x, W = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    y = torch.full((6,), IGNORE)
    result = linear_cross_entropy(x, W, y, reduction=reduction, z_loss=1.0, impl=impl)
    result.loss.sum().backward()
    for tensor in (*result, grad_of(x), grad_of(W)):
        assert not tensor.any()


@pytest.mark.usefixtures("softmax_pass")
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_may_hold_nan(reduction, impl):
    x, W, y = sample(40, 31)
    grads = []
    for filler in (0.0, float("nan")):
        rows = torch.where((y == IGNORE)[:, None], filler, x)
        leaves = (leaf(rows), leaf(W))
        result = linear_cross_entropy(*leaves, y, reduction=reduction, z_loss=1e-3, impl=impl)
        result.loss.sum().backward()
        grads.append((result.loss.detach(), *(grad_of(t) for t in leaves)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    assert not grads[1][1][y == IGNORE].any()


def test_label_zero_counts_and_another_ignore_index_works():
    x, W, _ = sample(8, 31)
    y = torch.tensor([0, 5] * 4)
    everything = linear_cross_entropy(x, W, y, reduction="none").loss
    assert bool((everything > 0).all())
    without = linear_cross_entropy(x, W, y, reduction="none", ignore_index=0).loss
    assert torch.equal(without, torch.where(y == 0, 0.0, everything))


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
def test_num_items_makes_accumulation_exact(as_tensor):
    # micro-batches of unequal size, divided by the count of the whole batch
    x, W, y = sample(60, 31)
    whole, parts = leaf(W), leaf(W)
    one = linear_cross_entropy(x, whole, y, z_loss=1e-3)
    one.loss.backward()
    count = (y != IGNORE).sum()
    total, z = 0.0, 0.0
    for rows in (slice(0, 7), slice(7, 60)):
        items = count if as_tensor else int(count)
        part = linear_cross_entropy(x[rows], parts, y[rows], z_loss=1e-3, num_items=items)
        part.loss.backward()
        total, z = total + part.loss.item(), z + part.z.item()
    assert total == pytest.approx(one.loss.item(), rel=1e-6)
    assert z == pytest.approx(one.z.item(), rel=1e-6)
    torch.testing.assert_close(grad_of(parts), grad_of(whole), rtol=1e-5, atol=1e-7)


def test_num_items_zero_without_labels_is_zero():
    x, W, _ = sample(4, 31)
    assert linear_cross_entropy(x, W, torch.full((4,), IGNORE), num_items=0).loss.item() == 0


def test_parts_of_the_output():
    x, W, y = sample(50, 31)
    result = linear_cross_entropy(x, leaf(W), y, z_loss=1e-2)
    assert isinstance(result, LinearCrossEntropyOutput)
    count = (y != IGNORE).sum()
    torch.testing.assert_close(result.z, 1e-2 * result.lse.square().sum() / count)
    torch.testing.assert_close(result.loss, result.nll.sum() / count + result.z)
    assert [part.requires_grad for part in result] == [True, False, False, False]


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_layouts_and_leading_axes(impl):
    x, W, y = sample(48, 31)
    expected = linear_cross_entropy(x, W, y, impl=impl)
    columns, wide = x.t().contiguous().t(), torch.cat([W, W], 1)[:, : W.shape[1]]
    assert not columns.is_contiguous()
    assert not wide.is_contiguous()
    strided = linear_cross_entropy(columns, wide, y, impl=impl)
    batched = linear_cross_entropy(x.view(2, 4, 6, -1), W, y.view(2, 4, 6), impl=impl)
    for a, b, c in zip(expected, strided, batched, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(c, a, rtol=0, atol=0)


@pytest.mark.usefixtures("softmax_pass")
@pytest.mark.parametrize("label", [31, -1, 2**40])
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_a_label_outside_the_vocabulary_is_named(impl, label):
    x, W, y = sample(8, 31)
    y[3] = label
    with pytest.raises(ValueError, match=rf"label {label}, but linear_weight has V=31"):
        linear_cross_entropy(x, W, y, impl=impl)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "avg"}, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
        ({"impl": "triton"}, "impl must be 'fused' or 'reference', got 'triton'"),
        ({"z_loss": -1.0}, "z_loss must be a finite number >= 0, got -1.0"),
        ({"z_loss": float("nan")}, "z_loss must be a finite number"),
        ({"num_items": -1}, "num_items must be a count of tokens, got -1"),
        ({"num_items": 3, "reduction": "sum"}, "num_items is what 'mean' divides by"),
        ({"num_items": torch.ones(2)}, "num_items must be one number"),
        ({"target": torch.zeros(5, dtype=torch.long)}, r"target \(5,\) and input \(4, 3\)"),
        ({"target": torch.zeros(4)}, "target must be int64, got torch.float32"),
        ({"linear_weight": torch.ones(7, 2)}, "input has H=3, an earlier argument has H=2"),
        ({"linear_weight": torch.ones(7)}, r"linear_weight must have shape \(V H\)"),
        ({"input": torch.ones(4, 3).double()}, "input is torch.float64; impl='fused' takes"),
        ({"input": torch.ones(4, 3, device="meta")}, "must be on one device, got meta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message):
    good = {
        "input": torch.ones(4, 3),
        "linear_weight": torch.ones(7, 3),
        "target": torch.zeros(4, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(good | change))


def test_sharded_weights_are_refused():
    x, W, y = sample(4, 31)
    setattr(W, "full_tensor", lambda: W)  # noqa: B010 - what tells a DTensor apart
    with pytest.raises(NotImplementedError, match=r"full_tensor\(\)"):
        linear_cross_entropy(x, W, y)


def test_second_derivative_of_the_fused_loss_is_refused():
    x, W, y = sample(4, 31)
    x.requires_grad_()
    factor = torch.ones((), requires_grad=True)
    loss = linear_cross_entropy(x, W, y).loss * factor
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])  # both ways to the gradients
def test_autocast_changes_nothing_inside(reduction: str):
    x, W, y = sample(9, 31)
    leaves = x.requires_grad_(), W.requires_grad_()
    expected = linear_cross_entropy(x, W, y, reduction=reduction)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(x, W, y, reduction=reduction)
        grads = torch.autograd.grad(got.loss.sum(), leaves)
    assert torch.equal(got.loss, expected.loss)
    for grad, want in zip(grads, torch.autograd.grad(expected.loss.sum(), leaves), strict=True):
        assert torch.equal(grad, want)


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False), (False, False)])
def test_opcheck(wanted):
    x, W, y = sample(9, 31)
    weight = (y != IGNORE).float()
    torch.library.opcheck(ops.forward, (x, W, y, weight, 1e-3, *wanted))
    torch.library.opcheck(ops.backward, (weight, x, W, y, 1e-3, *wanted))


def test_compile_is_the_first_call_of_a_process():
    code = """
import torch, apical
from apical.kernels.linear_cross_entropy.api import linear_cross_entropy
for reduction in ("mean", "none"):
    def loss(x, W, y): return linear_cross_entropy(x, W, y, reduction=reduction, z_loss=1e-3)
    fast = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9):
        x, W = torch.randn(n, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
        y = torch.randint(0, 7, (n,)); y[0] = -100
        for got, expected in zip(fast(x, W, y), loss(x, W, y)):
            torch.testing.assert_close(got, expected)
        got = torch.autograd.grad(fast(x, W, y).loss.sum(), (x, W))
        expected = torch.autograd.grad(loss(x, W, y).loss.sum(), (x, W))
        torch.testing.assert_close(got, expected)
print("ok")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "ok\n", run.stderr[-2000:]
