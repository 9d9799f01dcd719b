"""What the loss keeps, hands over and computes again."""

import gc
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from apical import linear_cross_entropy
from apical.kernels.linear_cross_entropy import ops

from .linear_cross_entropy_cases import grad_of, labelled_rows, leaf, sample


class Call(NamedTuple):
    """The gradients that one call of the forward op made."""

    addresses: list[int]
    alive: list[weakref.ref[Tensor]]


@pytest.fixture
def calls(monkeypatch) -> list[Call]:
    """Every call of the forward op."""
    found, op = [], ops.forward

    def forward(*args: Any) -> Any:
        out = op(*args)
        found.append(Call([t.data_ptr() for t in out[-3:]], [weakref.ref(t) for t in out[-3:]]))
        return out

    monkeypatch.setattr(ops, "forward", forward)
    return found


def test_float32_gradients_are_handed_over_without_a_copy(calls):
    x, W, y = sample(50, 31)
    leaves = (leaf(x), leaf(W), leaf(torch.zeros(31)))
    loss = linear_cross_entropy(*leaves[:2], y, linear_bias=leaves[2]).loss
    loss.backward()
    assert [grad_of(t).data_ptr() for t in leaves] == calls[0].addresses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_backward_forgets_the_gradients(calls, dtype):
    x, W, y = sample(50, 31)
    leaves = (leaf(x, dtype), leaf(W, dtype))
    loss = linear_cross_entropy(*leaves, y).loss
    assert calls[0].alive[1]() is not None
    loss.backward(retain_graph=True)
    for t in leaves:
        t.grad = None
    gc.collect()
    # the loss, and with it the graph, is still there
    assert loss.grad_fn is not None
    assert [ref() for ref in calls[0].alive[:2]] == [None, None]


def test_a_retained_graph_computes_again(calls):
    x, W, y = sample(50, 31)
    leaves = (leaf(x), leaf(W))
    loss = linear_cross_entropy(*leaves, y).loss
    first = torch.autograd.grad(loss * 2, leaves, retain_graph=True)
    assert len(calls) == 1
    kept = [t.clone() for t in first]
    second = torch.autograd.grad(loss * 3, leaves)
    assert len(calls) == 2
    for a, b, unchanged in zip(first, second, kept, strict=True):
        assert torch.equal(a, unchanged)
        torch.testing.assert_close(b, a * 1.5, rtol=1e-6, atol=0)


def test_nothing_of_the_size_of_all_logits_is_made(monkeypatch):
    # the largest tensor of forward and backward is a chunk of logits
    monkeypatch.setattr(labelled_rows, "_CHUNK_ROWS", (16, 16))
    x, W, y = sample(512, 300, H=8)
    leaves = (leaf(x), leaf(W))
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3, "weight": torch.rand(300)}
    for reduction in ("mean", "none"):
        with torch.profiler.profile(profile_memory=True) as profile:
            linear_cross_entropy(*leaves, y, reduction=reduction, **options).loss.sum().backward()
        events = profile.events()
        assert events is not None
        largest = max(event.cpu_memory_usage for event in events)
        assert 4 * 16 * 300 <= largest < 4 * 512 * 300 / 4


def test_no_gradient_is_made_that_is_not_wanted(calls):
    x, W, y = sample(50, 31)
    linear_cross_entropy(leaf(x), W, y)
    linear_cross_entropy(x, leaf(W), y)
    linear_cross_entropy(x, W, y)
    assert [[bool(address) for address in call.addresses[:2]] for call in calls] == [
        [True, False],
        [False, True],
        [False, False],
    ]
