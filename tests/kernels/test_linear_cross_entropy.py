"""The fused loss against float64, and the ways in which such losses have been wrong before."""

from itertools import chain

import pytest
import torch
from torch import Tensor

from apical import linear_cross_entropy

from .linear_cross_entropy_cases import (
    PASSES,
    definition,
    force,
    grad_of,
    labelled_rows,
    leaf,
    relative,
    sample,
)


@pytest.fixture(params=PASSES)
def softmax_pass(request, monkeypatch):
    force(request.param, monkeypatch)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 64 rows, so that small inputs have several."""
    monkeypatch.setattr(labelled_rows, "_CHUNK_ROWS", (64, 64))


# tokens: none, one, and both sides of a chunk boundary; vocabularies: no multiple of a vector, the
# demo's, and no multiple of a tile
@pytest.mark.usefixtures("softmax_pass", "small_chunks")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("T", "V"), [(0, 31), (1, 31), (127, 31), (128, 4096), (129, 5003), (65, 1)]
)
def test_matches_float64(T, V, dtype, reduction, check_error):
    x, W, y = sample(T, V)
    x, W = x.to(dtype), W.to(dtype)
    z_loss = 1e-3
    upstream = torch.randn(T) if reduction == "none" else torch.tensor(0.7)
    ours = (leaf(x, dtype), leaf(W, dtype))
    exact = (leaf(x, torch.float64), leaf(W, torch.float64))
    by_hand = (leaf(x, dtype), leaf(W, dtype))
    actual = linear_cross_entropy(*ours, y, reduction=reduction, z_loss=z_loss)
    truth, peer = (
        definition(*args, y, reduction=reduction, z_loss=z_loss) for args in (exact, by_hand)
    )
    for name, a, e, p in zip(actual._fields, actual, truth, peer, strict=True):
        check_error(a, e, p, name)
    actual.loss.backward(upstream)
    truth.loss.backward(upstream.double())
    peer.loss.backward(upstream)
    for name, a, e, p in zip(("input", "weight"), ours, exact, by_hand, strict=True):
        check_error(grad_of(a), grad_of(e), grad_of(p), f"gradient of {name}")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_is_the_definition(reduction):
    x, W, y = sample(50, 31)
    ours, exact = ((leaf(x, torch.float64), leaf(W, torch.float64)) for _ in range(2))
    actual = linear_cross_entropy(*ours, y, reduction=reduction, z_loss=1e-2, impl="reference")
    truth = definition(*exact, y, reduction=reduction, z_loss=1e-2)
    assert actual.loss.dtype == torch.float64
    for a, e in zip(actual, truth, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-6, atol=0)
    actual.loss.sum().backward()
    truth.loss.sum().backward()
    for a, e in zip(ours, exact, strict=True):
        torch.testing.assert_close(grad_of(a), grad_of(e), rtol=1e-12, atol=1e-14)


def test_reference_is_differentiable_twice():
    x, W, y = sample(5, 7, H=3)
    inputs = (leaf(x, torch.float64), leaf(W, torch.float64))

    def loss(x: Tensor, W: Tensor) -> Tensor:
        return linear_cross_entropy(x, W, y, z_loss=1e-2, impl="reference").loss

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def regime(name: str, V: int = 4096) -> tuple[Tensor, Tensor, Tensor]:
    T, H = 256, 128
    x, W, y = torch.randn(T, H), torch.randn(V, H) * H**-0.5, torch.randint(0, V, (T,))
    return {
        "random": (x, W, y),  # the start of training: loss about log V
        "wide": (4 * x, W, y),  # confident and wrong
        "trained": (10 * W[y] + 0.5 * x, W, y),
        "memorised": (30 * W[y], W, y),  # loss about 1e-6: below float32's epsilon times lse
        "extreme": (20 * x, W, y),  # loss about 80
    }[name]


@pytest.mark.usefixtures("softmax_pass")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["random", "wide", "trained", "memorised", "extreme"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_pass_itself_is_exact_in_every_regime(name, reduction, dtype):
    x, W, y = regime(name, V=512)
    # the products are the logits as they are: times one, plus zeros
    logits, one = (x @ W.t()).to(dtype), torch.eye(512, dtype=dtype)
    actual = linear_cross_entropy(logits, one, y, reduction=reduction).loss.mean()
    truth = definition(logits.double(), one.double(), y).loss
    assert abs(actual.item() / truth.item() - 1) <= 3e-7


@pytest.mark.usefixtures("softmax_pass")
@pytest.mark.parametrize(
    ("dtype", "grad_error"), [(torch.float32, 4e-6), (torch.bfloat16, 3e-3)], ids=str
)
@pytest.mark.parametrize("name", ["random", "wide", "trained", "memorised", "extreme"])
@pytest.mark.parametrize("reduction", ["mean", "none"])  # both ways to the gradients
def test_accurate_in_every_regime(name, reduction, dtype, grad_error):
    x, W, y = regime(name)
    ours = (leaf(x, dtype), leaf(W, dtype))
    exact = (leaf(ours[0], torch.float64), leaf(ours[1], torch.float64))
    actual = linear_cross_entropy(*ours, y, reduction=reduction).loss.mean()
    truth = definition(*exact, y).loss
    assert abs(actual.item() / truth.item() - 1) <= 1e-6
    actual.backward()
    truth.backward()
    for a, e in zip(ours, exact, strict=True):
        assert relative(grad_of(a), grad_of(e)) <= grad_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunk_count_changes_nothing(monkeypatch, dtype):
    x, W, y = sample(512, 300)
    results = []
    for rows in (512, 8):
        monkeypatch.setattr(labelled_rows, "_CHUNK_ROWS", (rows, rows))
        leaves = (leaf(x, dtype), leaf(W, dtype))
        loss = linear_cross_entropy(*leaves, y).loss
        loss.backward()
        results.append((loss, *(grad_of(t) for t in leaves)))
    (one, *grads_one), (many, *grads_many) = results
    assert abs(many.item() / one.item() - 1) <= 1e-6
    for a, b in zip(grads_many, grads_one, strict=True):
        # bf16: the sums are equal to 1e-6, so only ties of the last rounding may differ
        assert relative(a, b.double()) <= (1e-6 if dtype == torch.float32 else 1e-4)


def test_chunks_cover_the_rows_within_the_budget():
    for V in (31, 4096, 49152, 262144):
        for count in (0, 1, 255, 256, 257, 2049):
            parts = [part.tolist() for part in labelled_rows.row_chunks(torch.arange(count), V)]
            assert list(chain.from_iterable(parts)) == list(range(count))
            assert all(0 < len(part) <= len(parts[0]) for part in parts)
            assert all(4 * V * len(part) <= 49e6 or len(part) <= 256 for part in parts)


@pytest.mark.usefixtures("softmax_pass")
def test_runs_are_bitwise_equal():
    x, W, y = sample(300, 257)
    results = []
    for _ in range(2):
        leaves = (leaf(x, torch.float32), leaf(W, torch.float32))
        loss = linear_cross_entropy(*leaves, y, z_loss=1e-4).loss
        loss.backward()
        results.append((loss, *(grad_of(t) for t in leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("softmax_pass", "small_chunks")
@pytest.mark.parametrize("weights", ["random", "first-zero"])
def test_per_token_gradients_use_their_own_weight(weights):
    # peers multiplied every token's gradient by the first token's upstream gradient
    x, W, y = sample(100, 31)
    upstream = torch.rand(100)
    if weights == "first-zero":
        upstream[:10] = 0
    ours = (leaf(x, torch.float32), leaf(W, torch.float32))
    exact = (leaf(x, torch.float64), leaf(W, torch.float64))
    (linear_cross_entropy(*ours, y, reduction="none").loss * upstream).sum().backward()
    (definition(*exact, y, reduction="none").loss * upstream.double()).sum().backward()
    for a, e in zip(ours, exact, strict=True):
        assert relative(grad_of(a), grad_of(e)) <= 2e-6


@pytest.mark.usefixtures("softmax_pass")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["input", "weight", "both", "no_grad"])
def test_frozen_parts(frozen, reduction):
    # peers computed no gradient of the head over a frozen trunk, or failed without gradients
    x, W, y = sample(50, 31)
    full = (leaf(x, torch.float32), leaf(W, torch.float32))
    truth = linear_cross_entropy(*full, y, reduction=reduction)
    truth.loss.sum().backward()
    leaves = (leaf(x, torch.float32), leaf(W, torch.float32))
    leaves[0].requires_grad_(frozen not in ("input", "both"))
    leaves[1].requires_grad_(frozen not in ("weight", "both"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        result = linear_cross_entropy(*leaves, y, reduction=reduction)
    for a, b in zip(result, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    if frozen in ("both", "no_grad"):
        assert not result.loss.requires_grad
        return
    result.loss.sum().backward()
    for part, reference in zip(leaves, full, strict=True):
        if part.requires_grad:
            assert torch.equal(grad_of(part), grad_of(reference))
        else:
            assert part.grad is None


def test_a_changed_gradient_does_not_change_the_next_one():
    x, W, y = sample(50, 31)
    leaves = (leaf(x, torch.float32), leaf(W, torch.float32))
    loss = linear_cross_entropy(*leaves, y).loss
    loss.backward(retain_graph=True)
    first = [grad_of(t).clone() for t in leaves]
    for t in leaves:
        grad_of(t).zero_()
    loss.backward()
    for t, expected in zip(leaves, first, strict=True):
        assert torch.equal(grad_of(t), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(reduction):
    x, W, y = sample(50, 31)
    leaves = (leaf(x, torch.float32), leaf(W, torch.float32))
    loss = linear_cross_entropy(*leaves, y, reduction=reduction).loss.sum()
    first, second, scaled = (
        torch.autograd.grad(loss * factor, leaves, retain_graph=True) for factor in (1, 1, 4)
    )
    for a, b, c in zip(first, second, scaled, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(4 * a, c)


def test_half_precision_survives_a_loss_scaler():
    # gradients of 1e-9 are zero in float16 unless they are scaled before they are rounded
    x, W, y = sample(64, 4096)
    exact = (leaf(x.half() / 64, torch.float64), leaf(W.half() / 64, torch.float64))
    ours = (leaf(x.half() / 64, torch.float16), leaf(W.half() / 64, torch.float16))
    (linear_cross_entropy(*ours, y).loss * 2.0**16).backward()
    (definition(*exact, y).loss * 2.0**16).backward()
    for a, e in zip(ours, exact, strict=True):
        assert relative(grad_of(a), grad_of(e)) <= 1e-3


def test_mixed_dtypes_as_under_autocast():
    x, W, y = sample(50, 31)
    ours = (leaf(x, torch.bfloat16), leaf(W, torch.float32))
    exact = (leaf(ours[0], torch.float64), leaf(W, torch.float64))
    linear_cross_entropy(*ours, y).loss.backward()
    definition(*exact, y).loss.backward()
    assert (grad_of(ours[0]).dtype, grad_of(ours[1]).dtype) == (torch.bfloat16, torch.float32)
    assert relative(grad_of(ours[0]), grad_of(exact[0])) <= 3e-3
    assert relative(grad_of(ours[1]), grad_of(exact[1])) <= 1e-6


def test_tied_weights_add_up():
    _, W, y = sample(50, 31)
    ids = torch.randint(0, 31, (50,))
    ours, exact = leaf(W, torch.float32), leaf(W, torch.float64)
    linear_cross_entropy(ours[ids].tanh(), ours, y).loss.backward()
    definition(exact[ids].tanh(), exact, y).loss.backward()
    assert relative(grad_of(ours), grad_of(exact)) <= 1e-6
