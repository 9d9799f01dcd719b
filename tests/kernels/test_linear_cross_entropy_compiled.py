"""The loss's ops under torch's own checks, and inside compiled functions."""

import subprocess
import sys

import pytest
import torch

from apical import linear_cross_entropy
from apical.kernels.linear_cross_entropy import ops

from .linear_cross_entropy_cases import PASSES, force, grad_of, leaf, sample

# all, none, and each without the others
WANTED = [(True,) * 3, (False,) * 3, *(tuple(i == k for i in range(3)) for k in range(3))]
PLAIN, FULL = (0.0, 0.0, 0.0, 1.0), (0.1, 1e-3, 5.0, 0.7)


@pytest.fixture(params=PASSES)
def softmax_pass(request, monkeypatch):
    force(request.param, monkeypatch)


def arguments(full: bool) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """Return operands and labels, and a weight per token that leaves some out."""
    x, W, y = sample(9, 31)
    if not full:
        return [x, W, None, y[:, None], torch.ones(9, 1), None], (y >= 0).float()
    ids = torch.cat([y[:, None], torch.randint(0, 31, (9, 2))], 1)
    return [x, W, torch.randn(31), ids, torch.rand(9, 3), torch.rand(31)], (y >= 0).float()


@pytest.mark.usefixtures("softmax_pass")
@pytest.mark.parametrize("wanted", WANTED)
def test_opcheck_with_every_option(wanted):
    tensors, token_weight = arguments(full=True)
    torch.library.opcheck(ops.forward, (*tensors, token_weight, *FULL, *wanted))
    rows = (torch.randn(9), token_weight != 0)
    upstream = [torch.randn(9) for _ in range(3)]
    torch.library.opcheck(ops.backward, (*upstream, *tensors, *rows, *FULL, *wanted))


@pytest.mark.usefixtures("softmax_pass")
def test_opcheck_without_options():
    tensors, token_weight = arguments(full=False)
    wanted, rows = (True, True, False), (torch.randn(9), token_weight != 0)
    torch.library.opcheck(ops.forward, (*tensors, token_weight, *PLAIN, *wanted))
    upstream = (torch.randn(9), None, None)
    torch.library.opcheck(ops.backward, (*upstream, *tensors, *rows, *PLAIN, *wanted))


OPTIONS = """
import torch, apical
from apical.kernels.linear_cross_entropy.api import linear_cross_entropy
torch.manual_seed(0)
def options(n):
    return dict(linear_bias=torch.randn(7, requires_grad=True), weight=torch.rand(7),
        label_smoothing=0.1, softcap=5.0, logit_scale=0.7, token_weight=torch.rand(n),
        soft_ids=torch.randint(0, 7, (n, 2)), soft_weights=torch.rand(n, 2) / 2)
"""
LOOP = """
for reduction in ("mean", "none"):
    def loss(x, W, y, more):
        return linear_cross_entropy(x, W, y, reduction=reduction, z_loss=1e-3, **more)
    fast = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9):
        x, W = torch.randn(n, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
        y = torch.randint(0, 7, (n,)); y[0] = -100
        more = options(n) if full else {}
        leaves = (x, W, more["linear_bias"]) if full else (x, W)
        for got, expected in zip(fast(x, W, y, more), loss(x, W, y, more)):
            torch.testing.assert_close(got, expected)
        got = torch.autograd.grad(fast(x, W, y, more).loss.sum(), leaves)
        expected = torch.autograd.grad(loss(x, W, y, more).loss.sum(), leaves)
        torch.testing.assert_close(got, expected)
print("ok")
"""


@pytest.mark.parametrize("full", [False, True], ids=["plain", "every-option"])
def test_compile_is_the_first_call_of_a_process(full):
    code = OPTIONS + f"full = {full}\n" + LOOP
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "ok\n", run.stderr[-2000:]


# dynamo makes an instance of every torch.autograd.Function, which torch warns of
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_graph_that_is_retained_gives_the_same_gradient_twice():
    x, W, y = sample(30, 31)
    compiled = torch.compile(
        lambda x, W: linear_cross_entropy(x, W, y).loss, fullgraph=True, backend="aot_eager"
    )
    leaves, eager = (leaf(x), leaf(W)), (leaf(x), leaf(W))
    loss = compiled(*leaves)
    for factor in (1.0, 3.0):
        got = torch.autograd.grad(loss * factor, leaves, retain_graph=True)
        want = torch.autograd.grad(linear_cross_entropy(*eager, y).loss * factor, eager)
        for a, e in zip(got, want, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_around_the_loss():
    # the gradient goes on into the model: in place scaling must not reach what the graph shares
    x, W, y = sample(30, 31)
    trunk = torch.randn(24, 24) / 5

    def loss(x, trunk, W):
        hidden = torch.tanh(x @ trunk)
        return linear_cross_entropy(hidden, W, y, z_loss=1e-3).loss * 2 + hidden.square().mean()

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = (leaf(x), leaf(trunk), leaf(W))
        call(*leaves).backward()
        results.append([grad_of(t) for t in leaves])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-8)
