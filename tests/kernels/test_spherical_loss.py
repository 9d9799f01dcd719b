"""The spherical family without logits against all logits in float64."""

import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from apical.kernels.spherical_loss import (
    SphericalStatistics,
    log_spherical_softmax,
    log_taylor_softmax,
    ops,
    spherical_loss,
    spherical_statistics,
    standardized_loss,
)

IGNORE = -100
Loss = Callable[[SphericalStatistics], Tensor]
# location within what these vocabularies reach, so that both ends of the softplus are seen
Z = partial(standardized_loss, sharpness=1.5, location=1.0)
LOSSES: dict[str, Loss] = {
    "z": Z,
    "taylor": log_taylor_softmax,
    "spherical": partial(log_spherical_softmax, offset=0.1),
}


def leaf(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor.detach().to(dtype).clone().requires_grad_()


def sample(T: int, V: int, H: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    target = torch.randint(0, V, (T,))
    target[torch.rand(T) < 0.3] = IGNORE
    # what all rows have in common is what the moments must not lose
    return torch.randn(T, H), torch.randn(V, H) * H**-0.5 + 3 * torch.randn(H), target


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def by_hand(kind: str, x: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """The papers' formulas on all logits, (T,), 0 where ignored."""
    o = x @ W.t()
    own = o.gather(1, y.clamp(min=0)[:, None]).squeeze(1)
    if kind == "z":
        mean = o.sum(1) / len(W)
        sigma = ((o * o).sum(1) / len(W) - mean**2).sqrt()
        loss = torch.log1p(torch.exp(1.5 * (1.0 - (own - mean) / sigma))) / 1.5
    elif kind == "taylor":
        loss = torch.log((1 + o + o * o / 2).sum(1) / (1 + own + own * own / 2))
    else:
        loss = torch.log((o * o + 0.1).sum(1) / (own * own + 0.1))
    return torch.where(y == IGNORE, 0.0, loss)


# tokens: one, and more; vocabularies: narrower than the model, so that the covariance is singular,
# and more than one block of rows
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize(("T", "V"), [(1, 31), (77, 11), (130, 5003)])
def test_matches_all_logits_in_float64(T, V, impl, reduction, kind):
    x, W, y = sample(T, V)
    y[0] = 3
    exact, ours = ((leaf(x, d), leaf(W, d)) for d in (torch.float64, torch.float32))
    per_token = by_hand(kind, *exact, y)
    upstream = torch.randn(T) if reduction == "none" else torch.tensor(0.7)
    truth = {
        "none": per_token,
        "sum": per_token.sum(),
        "mean": per_token.sum() / (y != IGNORE).sum(),
    }[reduction]
    loss = spherical_loss(*ours, y, LOSSES[kind], reduction=reduction, impl=impl)
    assert loss.dtype == (torch.float32 if impl == "fused" else torch.float64)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-7)
    loss.backward(upstream.to(loss.dtype))
    truth.backward(upstream.double())
    for name, a, e in zip(("input", "weight"), ours, exact, strict=True):
        assert relative(grad_of(a), grad_of(e)) <= 1e-5, name


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_a_gradient_once(dtype, kind):
    x, W, y = sample(130, 203)
    x, W = x.to(dtype), W.to(dtype)
    exact, ours = (leaf(x, torch.float64), leaf(W, torch.float64)), (leaf(x, dtype), leaf(W, dtype))
    loss, truth = spherical_loss(*ours, y, LOSSES[kind]), by_hand(kind, *exact, y).sum()
    assert loss.item() == pytest.approx(truth.item() / (y != IGNORE).sum().item(), rel=1e-6)
    # a loss scaler's factor: float16 would lose what is below 6e-8
    (loss * (y != IGNORE).sum()).backward()
    truth.backward()
    for a, e in zip(ours, exact, strict=True):
        assert grad_of(a).dtype == dtype
        assert relative(grad_of(a), grad_of(e)) <= 3e-3


def test_mixed_dtypes_as_under_autocast():
    x, W, y = sample(50, 31)
    x = x.bfloat16()
    exact, ours = (leaf(x, torch.float64), leaf(W, torch.float64)), (leaf(x, x.dtype), leaf(W))
    by_hand("z", *exact, y).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = spherical_loss(*ours, y, Z, reduction="sum")
    loss.backward()
    assert relative(grad_of(ours[0]), grad_of(exact[0])) <= 3e-3
    assert relative(grad_of(ours[1]), grad_of(exact[1])) <= 1e-5


@pytest.mark.parametrize("kind", LOSSES)
def test_gradcheck_of_the_reference(kind):
    x, W, y = sample(5, 7, H=3)
    y[0] = 1
    leaves = (leaf(x, torch.float64), leaf(W, torch.float64))

    def loss(x: Tensor, W: Tensor) -> Tensor:
        return spherical_loss(x, W, y, LOSSES[kind], reduction="none", impl="reference")

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_statistics_are_those_of_the_logits():
    x, W, y = sample(40, 31)
    o = x.double() @ W.double().t()
    for impl in ("fused", "reference"):
        s = spherical_statistics(x, W, y, impl=impl)
        own = o.gather(1, y.clamp(min=0)[:, None]).squeeze(1)
        expected = (o.mean(1), o.var(1, correction=0), own - o.mean(1), own, o.square().mean(1))
        got = (s.mean, s.variance, s.margin, s.logit, s.mean_square)
        for a, e in zip(got, expected, strict=True):
            torch.testing.assert_close(a, torch.where(y == IGNORE, 0.0, e), rtol=1e-10, atol=1e-12)
        assert s.vocabulary == 31


# 1000 of 1: in float32 q - V mu^2 would be rounding alone
@pytest.mark.parametrize(("shift", "scale"), [(1000.0, 1.0), (0.0, 1e-3), (-50.0, 70.0)])
def test_the_z_loss_knows_no_shift_and_no_scale(shift, scale):
    x, W, y = sample(60, 301)
    # exact in float32: the moved logits are the logits
    W, x = (W * 1024).round() / 1024, (x * 1024).round() / 1024
    direction = torch.zeros(W.shape[1])
    direction[3] = shift
    moved = (W.double() * scale + direction).requires_grad_()
    ours = leaf(moved.detach().float())
    still = spherical_loss(x.double(), W.double(), y, Z, impl="reference")
    of_reference = spherical_loss(x.double(), moved, y, Z, impl="reference")
    of_ours = spherical_loss(x, ours, y, Z)
    assert of_reference.item() == pytest.approx(still.item(), rel=1e-9)
    # rounding the moved weights to float32 is the caller's
    rounded = spherical_loss(x.double(), ours.detach().double(), y, Z, impl="reference")
    assert of_ours.item() == pytest.approx(rounded.item(), rel=1e-6)
    of_ours.backward()
    # a loss that no shift changes pulls no common direction: the columns' sums are zero
    assert grad_of(ours).sum(0).norm() <= 1e-5 * grad_of(ours).abs().sum(0).norm()


def test_the_losses_normalise():
    # the exponentials of the likelihoods sum to one over the vocabulary
    x, W, _ = sample(1, 13)
    labels = torch.arange(13)
    for kind in ("taylor", "spherical"):
        each = spherical_loss(x.expand(13, -1), W, labels, LOSSES[kind], reduction="none")
        assert each.neg().exp().sum().item() == pytest.approx(1, rel=1e-6)


def test_logit_scale_scales_the_logits():
    x, W, y = sample(20, 31)
    for kind, loss in LOSSES.items():
        got = spherical_loss(x, W, y, loss, logit_scale=0.3)
        truth = spherical_loss(0.3 * x.double(), W.double(), y, loss, impl="reference")
        assert got.item() == pytest.approx(truth.item(), rel=1e-6), kind


def equal_logits(case: str) -> tuple[Tensor, Tensor]:
    x, W, _ = sample(6, 9)
    if case == "one word":
        return x, W[:1]
    if case == "equal rows":
        return x, W[:1].expand(9, -1)
    if case == "zero input":
        return torch.zeros_like(x), W
    # the rows differ, but not along the inputs: whole numbers, so that only the moments round
    part = torch.randint(-9, 9, (9, 3)).float()
    W = torch.cat([part, -part.sum(1, keepdim=True), torch.full((9, 20), 0.1)], 1)
    return torch.cat([torch.randn(6, 1).expand(-1, 4), x[:, 4:]], 1), W


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("case", ["one word", "equal rows", "zero input", "flat directions"])
def test_equal_logits_are_defined(impl, case):
    x, W = (leaf(t) for t in equal_logits(case))
    y = torch.zeros(6, dtype=torch.long)
    loss = spherical_loss(x, W, y, Z, impl=impl)
    loss.backward()
    # z is 0: neither above nor below the mean
    assert loss.item() == pytest.approx(math.log1p(math.exp(1.5)) / 1.5, rel=1e-6)
    assert not grad_of(x).any()
    assert not grad_of(W).any()
    for kind in ("taylor", "spherical"):
        leaves = leaf(x), leaf(W)
        value = spherical_loss(*leaves, y, LOSSES[kind], impl=impl)
        value.backward()
        assert value.item() == pytest.approx(math.log(len(W)), rel=1e-5, abs=1e-6)
        assert all(bool(grad_of(t).isfinite().all()) for t in leaves)


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("T", [0, 6])  # no rows at all, and none with a label
def test_nothing_to_learn_is_zero(impl, reduction, T):
    # an offset of 0 makes the logarithm of what was not measured infinite
    for loss in (*LOSSES.values(), partial(log_spherical_softmax, offset=0.0)):
        x, W = torch.randn(T, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
        y = torch.full((T,), IGNORE)
        value = spherical_loss(x, W, y, loss, reduction=reduction, impl=impl)
        value.sum().backward()
        for tensor in (value, grad_of(x), grad_of(W)):
            assert not tensor.any()


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_ignored_rows_may_hold_nan(impl):
    x, W, y = sample(40, 31)
    y[5] = -7
    y[y == IGNORE] = -7
    results = []
    for filler in (0.0, float("nan")):
        leaves = (leaf(torch.where((y == -7)[:, None], filler, x)), leaf(W))
        loss = spherical_loss(*leaves, y, Z, ignore_index=-7, impl=impl)
        loss.backward()
        results.append((loss.detach(), *(grad_of(t) for t in leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert not results[1][1][y == -7].any()


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
def test_num_items_makes_accumulation_exact(as_tensor):
    # micro-batches of unequal size, divided by the count of the whole batch
    x, W, y = sample(60, 31)
    whole, pieces = leaf(W), leaf(W)
    one = spherical_loss(x, whole, y, Z)
    one.backward()
    count, total = (y != IGNORE).sum(), 0.0
    for rows in (slice(0, 7), slice(7, 60)):
        items = count if as_tensor else int(count)
        piece = spherical_loss(x[rows], pieces, y[rows], Z, num_items=items)
        piece.backward()
        total += piece.item()
    assert total == pytest.approx(one.item(), rel=1e-6)
    torch.testing.assert_close(grad_of(pieces), grad_of(whole), rtol=1e-5, atol=1e-7)


def test_runs_are_bitwise_equal_with_one_label_in_many_rows():
    x, W, y = sample(300, 257)
    y[::2] = 5  # additions to one row: their order must be fixed
    runs = []
    for _ in range(2):
        leaves = (leaf(x), leaf(W))
        loss = spherical_loss(*leaves, y, Z)
        loss.backward(retain_graph=True)
        runs.append((loss, *(grad_of(t).clone() for t in leaves)))
        again = torch.autograd.grad(loss, leaves)
        runs.append((loss, *again))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("frozen", ["input", "weight", "both"])
def test_frozen_parts(frozen):
    x, W, y = sample(50, 31)
    full, leaves = (leaf(x), leaf(W)), (leaf(x), leaf(W))
    truth = spherical_loss(*full, y, Z)
    truth.backward()
    leaves[0].requires_grad_(frozen not in ("input", "both"))
    leaves[1].requires_grad_(frozen not in ("weight", "both"))
    loss = spherical_loss(*leaves, y, Z)
    assert torch.equal(loss, truth)
    if frozen == "both":
        assert not loss.requires_grad
        return
    loss.backward()
    for part, expected in zip(leaves, full, strict=True):
        if part.requires_grad:
            assert torch.equal(grad_of(part), grad_of(expected))
        else:
            assert part.grad is None


def test_layouts_and_leading_axes():
    x, W, y = sample(48, 31)
    expected = spherical_loss(x, W, y, Z, reduction="none")
    columns, wide = x.t().contiguous().t(), torch.cat([W, W], 1)[:, : W.shape[1]]
    strided = spherical_loss(columns, wide, y, Z, reduction="none")
    batched = spherical_loss(x.view(2, 4, 6, -1), W, y.view(2, 4, 6), Z, reduction="none")
    torch.testing.assert_close(strided, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(batched, expected.view(2, 4, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "avg"}, "reduction must be one of .*, got 'avg'"),
        ({"impl": "triton"}, "impl must be 'fused' or 'reference', got 'triton'"),
        ({"num_items": -1}, "num_items must be a count of tokens, got -1"),
        ({"num_items": 3, "reduction": "none"}, "num_items is what 'mean' divides by"),
        ({"target": torch.zeros(5, dtype=torch.long)}, r"target \(5,\) and input \(4, 3\)"),
        ({"target": torch.zeros(4)}, "target must be int64, got torch.float32"),
        ({"target": torch.full((4,), 7)}, "label 7, but linear_weight has V=7 rows"),
        ({"linear_weight": torch.ones(7, 2)}, "input has H=3, an earlier argument has H=2"),
        ({"input": torch.ones(4, 3).double()}, "input is torch.float64; impl='fused' takes"),
        ({"input": torch.ones(4, 3, device="meta")}, "on one device, got meta and target on cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message):
    good = {
        "input": torch.ones(4, 3),
        "linear_weight": torch.ones(7, 3),
        "target": torch.zeros(4, dtype=torch.long),
        "loss": Z,
    }
    with pytest.raises(ValueError, match=message):
        spherical_loss(**(good | change))


def test_second_derivative_of_the_fused_loss_is_refused():
    x, W, y = sample(4, 31)
    y[0], x = 1, leaf(x)
    (grad,) = torch.autograd.grad(spherical_loss(x, W, y, Z), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False), (False, False)])
def test_opcheck(wanted):
    x, W, y = sample(9, 31)
    args = (x, W, y, y != IGNORE)
    torch.library.opcheck(ops.forward, (*args, wanted[0]))
    _, centre, pull = ops.forward(*args, wanted[0])
    grads = torch.randn(3, 9, dtype=torch.float64)
    torch.library.opcheck(ops.backward, (grads, *args, centre, pull, *wanted))


def test_compile_is_the_first_call_of_a_process():
    code = """
import torch
from apical.kernels.spherical_loss import log_taylor_softmax, spherical_loss, standardized_loss
def both(s): return standardized_loss(s, sharpness=1.0, location=1.0) + log_taylor_softmax(s)
def loss(x, W, y): return spherical_loss(x, W, y, both)
fast = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
for n in (5, 9):
    x, W = torch.randn(n, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    y = torch.randint(0, 7, (n,)); y[0] = -100
    torch.testing.assert_close(fast(x, W, y), loss(x, W, y))
    got = torch.autograd.grad(fast(x, W, y), (x, W))
    torch.testing.assert_close(got, torch.autograd.grad(loss(x, W, y), (x, W)))
print("ok")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "ok\n", run.stderr[-2000:]
