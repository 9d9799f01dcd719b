"""The loss of bfloat16 on the matrix unit of a CPU: without the logits, where that can be."""

from typing import Any

import pytest
import torch
from torch import Tensor

from apical import linear_cross_entropy
from apical.kernels._common import native
from apical.kernels.linear_cross_entropy import _amx as amx

from .linear_cross_entropy_cases import definition, doubled, grad_of, leaf, sample

pytestmark = [
    pytest.mark.skipif(
        not (native.loaded() and torch.ops.apical.amx_supported()),
        reason="no library, or no matrix unit",
    ),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def sweeps(monkeypatch) -> list[int]:
    """How many chunks each sweep left to the pass over logits."""
    found, sweep = [], amx.sweep

    def spy(*arguments: Any) -> Any:
        left, written = sweep(*arguments)
        found.append(len(left))
        return left, written

    monkeypatch.setattr(amx, "sweep", spy)
    return found


def rows_of_chunk(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(amx, "_ROWS", rows)


def compare(
    x: Tensor, W: Tensor, y: Tensor, grad_error: float = 3e-3, **options: Any
) -> tuple[Tensor, ...]:
    """Hold values and gradients to float64 of the same bfloat16 numbers; return the gradients."""
    ours = (leaf(x, torch.bfloat16), leaf(W, torch.bfloat16))
    exact = (leaf(ours[0], torch.float64), leaf(ours[1], torch.float64))
    actual = linear_cross_entropy(*ours, y, **options)
    truth = definition(*exact, y, **doubled(options))
    for name, a, e in zip(actual._fields, actual, truth, strict=True):
        torch.testing.assert_close(
            a.double(), e, rtol=2e-6, atol=2e-5 if name == "entropy" else 1e-6, msg=name
        )
    actual.loss.backward()
    truth.loss.backward()
    for a, e in zip(ours, exact, strict=True):
        error = (grad_of(a).double() - grad_of(e)).norm()
        assert error <= grad_error * grad_of(e).norm()
    return tuple(grad_of(t) for t in ours)


# tokens: one, both sides of a block of 32 and of a chunk of 64; vocabularies: one entry, of which
# nothing is learnt, less than a block, both sides of a block and of a strip of 8; channels: one,
# around half a block and a block, a multiple of it (rows as they are), several odd blocks
@pytest.mark.parametrize(
    ("T", "V", "H"),
    [
        (1, 1, 1),
        (1, 7, 33),
        (31, 31, 16),
        (32, 32, 32),
        (33, 33, 17),
        (64, 255, 64),
        (65, 257, 96),
        (129, 1000, 100),
        (200, 300, 130),
    ],
)
def test_ragged_sizes(monkeypatch, sweeps, T, V, H):
    rows_of_chunk(monkeypatch, 64)
    compare(*sample(T, V, H, ignored=0))
    assert sweeps == [0]


@pytest.mark.parametrize(
    "options",
    [
        {"z_loss": 1e-2},
        {"logit_scale": 0.3},
        {"logit_scale": -1.5},  # the largest product is the smallest logit
        {"reduction": "sum"},
        {"num_items": 7},
        {"weight": torch.linspace(0.1, 2.0, 300)},
        {"weight": (torch.arange(300) % 2).float()},  # half of the targets count for nothing
        {"token_weight": torch.linspace(-1.0, 1.0, 90)},
        {"z_loss": 1e-1, "logit_scale": 2.0, "token_weight": torch.linspace(0.0, 2.0, 90)},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(monkeypatch, sweeps, options):
    rows_of_chunk(monkeypatch, 32)
    compare(*sample(90, 300, 48), **options)
    assert sweeps == [0]


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 5.0},
        {"label_smoothing": 0.1},
        {"linear_bias": torch.linspace(-1.0, 1.0, 300)},
        {"soft_ids": torch.zeros(90, 1, dtype=torch.int64), "soft_weights": torch.ones(90, 1) / 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_needs_the_logits_has_them(sweeps, options):
    # the pass over logits rounds each entry of their gradient, the large one of the target too
    compare(*sample(90, 300, 48), grad_error=4e-3, **options)
    assert sweeps == []


def test_a_scale_of_nothing(sweeps):
    x, W, y = sample(40, 300, ignored=0)
    leaves = (leaf(x, torch.bfloat16), leaf(W, torch.bfloat16))
    found = linear_cross_entropy(*leaves, y, logit_scale=0.0)
    found.loss.backward()
    torch.testing.assert_close(found.nll, torch.full((40,), 300.0).log())
    assert all((grad_of(t) == 0).all() for t in leaves)
    assert sweeps == []


def test_ignored_rows_are_not_read(sweeps):
    x, W, y = sample(70, 50, 40)
    whole = compare(x, W, y)
    x[y == -100] = torch.nan
    again = compare_loss(x, W, y)
    assert sweeps == [0, 0]
    for a, b in zip(again, whole, strict=True):
        assert torch.equal(a, b)
    assert (whole[0][y == -100] == 0).all()


def compare_loss(x: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients alone."""
    leaves = (leaf(x, torch.bfloat16), leaf(W, torch.bfloat16))
    linear_cross_entropy(*leaves, y).loss.backward()
    return tuple(grad_of(t) for t in leaves)


def test_every_row_ignored(sweeps):
    x, W, y = sample(40, 50)
    for grad in compare_loss(x, W, y.fill_(-100)):
        assert (grad == 0).all()
    assert sweeps == [0]


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["input", "weight"])
def test_one_gradient_alone_is_the_same(sweeps, wanted):
    x, W, y = sample(100, 200, 48)
    both = compare(x, W, y)
    leaves = [
        leaf(t, torch.bfloat16).requires_grad_(on) for t, on in zip((x, W), wanted, strict=True)
    ]
    linear_cross_entropy(leaves[0], leaves[1], y).loss.backward()
    for alone, together, on in zip(leaves, both, wanted, strict=True):
        assert torch.equal(grad_of(alone), together) if on else alone.grad is None
    assert sweeps == [0, 0]


def test_the_loss_alone_is_the_same(sweeps):
    x, W, y = sample(100, 200, 48)
    leaves = (leaf(x, torch.bfloat16), leaf(W, torch.bfloat16))
    with_gradient = linear_cross_entropy(*leaves, y)
    with torch.no_grad():
        alone = linear_cross_entropy(*leaves, y)
    assert sweeps == [0, 0]
    for a, b in zip(alone, with_gradient, strict=True):
        assert torch.equal(a, b)


# logits between those of bfloat16's exactness: W is the identity, x holds the logits
def given_logits(z: Tensor) -> tuple[Tensor, Tensor]:
    return z, torch.eye(z.shape[1])


@pytest.mark.parametrize(("above", "left"), [(48.0, 0), (52.0, 1), (100.0, 1), (300.0, 1)])
def test_a_target_far_below_the_largest_logit(sweeps, above, left):
    z, y = torch.randn(40, 64).bfloat16().float(), torch.randint(0, 64, (40,))
    z[3, (y[3] + 1) % 64] = z[3, y[3]].round() + above
    compare(*given_logits(z), y)
    assert sweeps == [left]


@pytest.mark.parametrize("where", ["first", "last", "all"])
def test_only_chunks_out_of_reach_need_their_logits(monkeypatch, sweeps, where):
    rows_of_chunk(monkeypatch, 32)
    z, y = torch.randn(96, 64), torch.randint(0, 64, (96,))
    for row in {"first": [5], "last": [90], "all": [0, 40, 95]}[where]:
        z[row, (y[row] + 1) % 64] = 100.0
    # the pass rounds each entry of a gradient that W then leaves as it is
    compare(*given_logits(z), y, grad_error=4e-3)
    assert sweeps == [3 if where == "all" else 1]


def test_a_certain_target(sweeps):
    # every other exponential is 0 in float32: the loss and its gradient are, too
    z, y = torch.full((33, 64), -60.0), torch.randint(0, 64, (33,))
    z.scatter_(1, y[:, None], 60.0)
    leaves = [leaf(t, torch.bfloat16) for t in given_logits(z)]
    found = linear_cross_entropy(leaves[0], leaves[1], y)
    found.loss.backward()
    assert found.loss.item() == 0
    assert found.accuracy.item() == 1
    assert all((grad_of(t) == 0).all() for t in leaves)
    assert sweeps == [0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["input", "weight"])
def test_what_is_not_finite_is_what_the_logits_make_of_it(monkeypatch, sweeps, bad, where):
    x, W, y = sample(40, 50, ignored=0)
    (x if where == "input" else W)[4, 3] = bad
    leaves = [(leaf(x, torch.bfloat16), leaf(W, torch.bfloat16)) for _ in range(2)]
    found = linear_cross_entropy(*leaves[0], y)
    assert sweeps == [1]
    monkeypatch.setattr(amx, "fuses", lambda *arguments: False)
    logits = linear_cross_entropy(*leaves[1], y)
    for a, b in zip(found, logits, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    found.loss.backward()
    logits.loss.backward()
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(grad_of(a), grad_of(b)) or torch.equal(
            grad_of(a).isnan(), grad_of(b).isnan()
        )


def test_equal_logits_count_as_correct(sweeps):
    # rows of W that are equal, as unused ones are: the target is as large as the largest
    x, W = torch.randn(50, 40), torch.randn(1, 40).expand(300, 40)
    found = linear_cross_entropy(x.bfloat16(), W.bfloat16(), torch.randint(0, 300, (50,)))
    assert sweeps == [0]
    assert found.accuracy.item() == 1
    torch.testing.assert_close(found.nll, torch.full((50,), 300.0).log())


def test_a_weight_off_any_alignment(sweeps):
    x, W, y = sample(40, 70, 64, ignored=0)
    around = torch.zeros(70 * 64 + 3, dtype=torch.bfloat16)
    around[3:] = W.bfloat16().flatten()
    shifted = around[3:].view(70, 64).detach().requires_grad_()
    leaves = (leaf(x, torch.bfloat16), leaf(W, torch.bfloat16))
    linear_cross_entropy(*leaves, y).loss.backward()
    linear_cross_entropy(leaf(x, torch.bfloat16), shifted, y).loss.backward()
    assert torch.equal(grad_of(shifted), grad_of(leaves[1]))
    assert sweeps == [0, 0]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_each_time(threads):
    # several strips of the vocabulary, so that two threads have work
    x, W, y = sample(100, 1500, 48)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        one, two = (compare(x, W, y) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_chunks_fit_their_memory():
    rows = torch.arange(2000)
    for V, H, most in [(49152, 576, 512), (49152, 64, 608), (131072, 256, 256), (50, 8, 512)]:
        sizes = [len(chunk) for chunk in amx._chunks(rows, V, H, kept=True)]
        assert sum(sizes) == 2000
        assert max(sizes) == sizes[0] <= min(most, 512)
        assert 2 * V * sizes[0] <= max(60e6, 2 * V * H)
    assert len(amx._chunks(rows, 131072, 256, kept=False)) == 4
