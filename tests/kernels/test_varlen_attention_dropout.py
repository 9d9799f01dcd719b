"""Dropout: the bits of Philox, the weights they keep, and the gradient through the same ones."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from apical.kernels.varlen_attention import varlen_attention
from apical.kernels.varlen_attention._philox import kept, philox

from . import varlen_attention_definition as spec

pytestmark = pytest.mark.usefixtures("one_thread")

CU = spec.boundaries([30, 0, 70])
SEED = torch.tensor([1234567890123456789])


@pytest.fixture(params=spec.IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    return spec.force(request.param, monkeypatch)


# Random123's tests/kat_vectors, "philox4x32 10": counter, key, the first word of the result
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF, 0xFFFFFFFF), 0x408F276D),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        0xD16CFE09,
    ),
]


def seed_of(key: tuple[int, int]) -> torch.Tensor:
    # as int64: a high word of 2 ** 31 and more makes it negative
    return torch.tensor([np.uint64(key[1] << 32 | key[0]).astype(np.int64)])


@pytest.mark.parametrize(("counter", "key", "word"), KNOWN_ANSWERS)
def test_known_answers_of_random123(counter, key, word):
    words = torch.tensor(counter).unbind()
    assert int(philox(seed_of(key), words)) == word  # pyright: ignore[reportArgumentType]
    # and the numpy words, against which all weights are held
    assert int(spec.philox(key, counter)[0]) == word


def test_bits_are_those_of_an_independent_philox():
    draw = np.random.default_rng(0)
    counter = draw.integers(0, 2**32, (4, 1000))
    for key in draw.integers(0, 2**32, (5, 2)).tolist():
        ours = philox(seed_of(key), torch.from_numpy(counter).unbind())  # pyright: ignore
        assert np.array_equal(ours.numpy(), spec.philox(key, list(counter))[0])


# the rate's threshold is rounded down; none is dropped at the smallest, nearly all at the largest
@pytest.mark.parametrize("rate", [2**-33, 0.1, 0.5, 0.999])
def test_counter_is_key_row_and_head(rate):
    # rows and keys beyond 2 ** 16, whose halves are multiplied apart
    rows, keys = torch.tensor([0, 7, 2**17 + 3]), torch.tensor([0, 1, 70_000])
    got = kept(SEED, rate, rows=rows, keys=keys, heads=3)
    for h, i, j in np.ndindex(3, 3, 3):
        counter = (int(keys[j]), int(rows[i]), h, 0)
        key = (int(SEED) & 0xFFFFFFFF, int(SEED) >> 32)
        assert bool(got[h, i, j]) == (int(spec.philox(key, counter)[0][()]) >= int(rate * 2**32))


def weights(rate: float, seed: torch.Tensor | None = SEED) -> torch.Tensor:
    """Return the weights (T, 2, 100) of 100 tokens after dropout; equal ones without it."""
    q, k, v = torch.zeros(100, 2, 8), torch.zeros(100, 2, 8), torch.zeros(100, 2, 100)
    v[torch.arange(100), :, torch.arange(100)] = 1.0
    return varlen_attention(q, k, v, CU, dropout_p=rate, dropout_seed=seed)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_mean_and_variance(implementation, rate):
    # a kept weight of the second document is 1 / 70 / (1 - rate)
    got = weights(rate)[30:, :, 30:] * 70
    values, count = got.unique(), got.numel()
    expected = torch.tensor([0.0, 1 / (1 - rate)])
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=0.0)
    # within four standard errors
    deviation = math.sqrt(rate / (1 - rate))
    assert abs(float(got.mean()) - 1.0) < 4 * deviation / math.sqrt(count)
    # heads, rows and keys are independent: their means vary as means of independent draws do
    for dim in (0, 2):
        means = got.mean(dim)
        spread = deviation / math.sqrt(got.shape[dim])
        assert 0.7 * spread < float(means.std()) < 1.3 * spread


def test_one_seed_is_one_set_of_weights(implementation):
    first = weights(0.5)
    assert torch.equal(weights(0.5), first)
    assert not torch.equal(weights(0.5, SEED + 1), first)
    # the high word counts
    assert not torch.equal(weights(0.5, SEED + 2**32), first)


def test_default_seed_is_torchs():
    torch.manual_seed(3)
    first, second = weights(0.5, None), weights(0.5, None)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(weights(0.5, None), first)


def test_implementations_keep_the_weights_of_the_reference(implementation):
    tensors = spec.inputs(100, 100, heads=2)
    eye = torch.eye(100)[:, None].expand(-1, 2, -1)
    ours, reference = (
        varlen_attention(
            tensors["q"], tensors["k"], eye, CU, dropout_p=0.5, dropout_seed=SEED, impl=impl
        )
        for impl in ("fused", "reference")
    )
    assert torch.equal(ours > 0, reference > 0)


def test_gradient_is_through_the_weights_of_the_forward(implementation):
    # linear in v: the gradient of v is the transpose of the weights, dropped ones included
    q, k = torch.randn(100, 2, 8), torch.randn(100, 2, 8)
    v, g = torch.randn(100, 2, 100, requires_grad=True), torch.randn(100, 2, 100)
    options: dict[str, Any] = {"dropout_p": 0.5, "dropout_seed": SEED}
    eye = torch.eye(100)[:, None].expand(-1, 2, -1)
    p = varlen_attention(q, k, eye, CU, **options)
    out = varlen_attention(q, k, v, CU, **options)
    (grad,) = torch.autograd.grad(out, v, g)
    torch.testing.assert_close(grad, torch.einsum("ihj,ihe->jhe", p, g), rtol=1e-4, atol=1e-5)


def test_no_dropout_is_no_dropout():
    tensors = spec.inputs(100, 100)
    q, k, v = (tensors[name] for name in "qkv")
    got = varlen_attention(q, k, v, CU, dropout_p=0.0, dropout_seed=SEED)
    assert torch.equal(got, varlen_attention(q, k, v, CU))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_recomputes_the_same_weights(reentrant):
    tensors = spec.inputs(100, 100)
    leaves = [tensors[name].requires_grad_() for name in "qkv"]

    def attend(q, k, v):
        return varlen_attention(q, k, v, CU, dropout_p=0.5)

    runs = []
    for run in (attend, lambda *x: checkpoint(attend, *x, use_reentrant=reentrant)):
        torch.manual_seed(0)
        for leaf in leaves:
            leaf.grad = None
        out = run(*leaves)
        out.square().sum().backward()
        runs.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
