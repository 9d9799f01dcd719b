"""Every option of the loss against float64, alone and with the others."""

from typing import Any

import pytest
import torch

from apical import linear_cross_entropy

from . import linear_cross_entropy_cases as cases
from .linear_cross_entropy_cases import grad_of, leaf, relative, sample

pytestmark = pytest.mark.usefixtures("one_thread", "softmax_pass", "small_chunks")


@pytest.fixture(params=cases.PASSES)
def softmax_pass(request, monkeypatch):
    cases.force(request.param, monkeypatch)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 16 rows, so that small inputs have several."""
    monkeypatch.setattr(cases.labelled_rows, "_CHUNK_ROWS", (16, 16))


T, V = 53, 37
BIAS, CLASSES, TOKENS = (
    torch.linspace(-2, 2, V),
    torch.linspace(0.1, 2, V),
    torch.linspace(-1, 2, T),
)
IDS = torch.arange(T * 4).view(T, 4) * 7 % V
ALONE = {
    "plain": {},
    "bias": {"linear_bias": BIAS},
    "class-weights": {"weight": CLASSES},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing-alone": {"label_smoothing": 1.0},
    "smoothing-class-weights": {"label_smoothing": 0.3, "weight": CLASSES},
    "z-loss": {"z_loss": 0.1},
    "softcap": {"softcap": 1.5},
    "scale": {"logit_scale": -2.0},
    "scale-bias-softcap": {"logit_scale": 0.3, "linear_bias": BIAS, "softcap": 5.0},
    "token-weights": {"token_weight": TOKENS},
    "one-soft-label": {"soft_ids": IDS[:, :1], "soft_weights": torch.full((T, 1), 0.7)},
    "soft-labels": {"soft_ids": IDS, "soft_weights": torch.full((T, 4), 0.2)},
    # nothing left for the target
    "soft-labels-alone": {"soft_ids": IDS, "soft_weights": torch.full((T, 4), 0.25)},
    "a-label-twice": {"soft_ids": IDS[:, :1].repeat(1, 3), "soft_weights": torch.full((T, 3), 0.3)},
}


def compare(options: dict[str, Any], dtype: torch.dtype, budget: float) -> None:
    """Hold all outputs and gradients to the definition; the upstream gradients are random."""
    x, W, y = sample(T, V)
    names, given = ["input", "linear_weight"], dict(options)
    tensors = {"input": x, "linear_weight": W}
    if "linear_bias" in given:
        tensors["linear_bias"] = given.pop("linear_bias")
        names.append("linear_bias")
    ours, plain = ({name: leaf(tensors[name], dtype) for name in names} for _ in range(2))
    exact = {name: leaf(ours[name], torch.float64) for name in names}
    actual = cases.run({**ours, "target": y}, given)
    truth = cases.exactly({**exact, "target": y}, cases.doubled(given))
    peer = cases.exactly({**plain, "target": y}, given)
    # tokens of negative weight cancel others: a sum is as exact as the sum of its terms' sizes
    sizes = dict(given)
    if "token_weight" in sizes:
        sizes["token_weight"] = sizes["token_weight"].abs()
    terms = cases.exactly({**exact, "target": y}, cases.doubled(sizes))
    # the loss of bfloat16 inputs is as exact as that of float32
    for name, a, e, size in zip(actual._fields, actual, truth, terms, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == e.shape
        assert bool((a - e).norm() <= 5e-7 * size.norm()), name
    parts = (0, 1, 2) if given.get("reduction") == "none" else (0,)
    weights = {i: torch.randn(actual[i].shape) for i in parts}
    for out in (actual, truth, peer):
        torch.stack([(out[i] * weights[i].to(out[i].dtype)).sum() for i in parts]).sum().backward()
    for name in names:
        assert grad_of(ours[name]).dtype == dtype
        want = grad_of(exact[name])
        # where terms cancel, as those of smoothing do, plain PyTorch loses digits as well
        loss_of_digits = 2 * relative(grad_of(plain[name]), want) + torch.finfo(dtype).eps / 2
        allowed = max(budget, loss_of_digits)
        assert relative(grad_of(ours[name]), want) <= allowed, name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ALONE)
def test_each_option(name, reduction):
    compare({**ALONE[name], "reduction": reduction}, torch.float32, 3e-6)


# bfloat16: half of its epsilon is 2e-3
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-3)])
@pytest.mark.parametrize("seed", range(40))
def test_random_combinations(seed, dtype, budget):
    torch.manual_seed(seed)
    compare(cases.random_options(seed, T, V), dtype, budget)


def test_combinations_cover_every_pair_of_options():
    drawn = [set(cases.random_options(seed, T, V)) for seed in range(40)]
    names = set().union(*drawn)
    assert len(names) == 11
    never = {("num_items", "reduction")}
    pairs = {(a, b) for a in names for b in names if a < b} - never
    assert all(any({a, b} <= options for options in drawn) for a, b in pairs)


def test_soft_labels_that_hold_the_target_keep_the_digits_of_a_small_loss():
    # logits of 15 at the target: p - 1 is 1e-5, of which a difference in float32 leaves 2 digits
    W, y = 15.0 * torch.eye(V), torch.arange(T) % V
    x = torch.eye(V)[y]
    options: dict[str, Any] = {"soft_ids": y[:, None], "soft_weights": torch.full((T, 1), 0.6)}
    ours, exact = leaf(x), leaf(x, torch.float64)
    linear_cross_entropy(ours, W, y, **options).loss.backward()
    cases.definition(exact, W.double(), y, **options).loss.backward()
    assert relative(grad_of(ours), grad_of(exact)) <= 1e-5


def test_nll_and_lse_alone_are_differentiable():
    # CCE's return_lse, requests for log-probabilities per token: no gradient of loss is there
    x, W, y = sample(T, V)
    for name in ("nll", "lse"):
        ours, exact = (leaf(x), leaf(W)), (leaf(x, torch.float64), leaf(W, torch.float64))
        options: dict[str, Any] = {"reduction": "none", "label_smoothing": 0.2, "z_loss": 0.1}
        getattr(linear_cross_entropy(*ours, y, **options), name).square().sum().backward()
        getattr(cases.definition(*exact, y, **options), name).square().sum().backward()
        for a, e in zip(ours, exact, strict=True):
            assert relative(grad_of(a), grad_of(e)) <= 3e-6


def test_a_token_of_weight_zero_is_left_out_but_counted():
    x, W, y = sample(T, V, ignored=0.0)
    token_weight = (torch.arange(T) % 3 != 0).float()
    x[token_weight == 0] = float("nan")
    result = linear_cross_entropy(x, W, y, token_weight=token_weight)
    masked = torch.where(token_weight == 0, cases.IGNORE, y)
    expected = linear_cross_entropy(x, W, masked, num_items=T)
    for a, e in zip(result, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_impossible_tokens(reduction):
    # padding of the vocabulary: a bias of -inf, and soft labels without a share that point at it
    x, W, y = sample(T, V)
    bias = torch.zeros(V + 3)
    bias[V:] = -torch.inf
    wide = torch.cat([W, torch.randn(3, W.shape[1])])
    soft: dict[str, Any] = {"soft_ids": torch.full((T, 1), V), "soft_weights": torch.zeros(T, 1)}
    padded, plain = leaf(wide), leaf(W)
    a = linear_cross_entropy(x, padded, y, linear_bias=bias, reduction=reduction, **soft)
    b = linear_cross_entropy(x, plain, y, reduction=reduction)
    for got, want in zip(a, b, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    a.loss.sum().backward()
    b.loss.sum().backward()
    assert relative(grad_of(padded)[:V], grad_of(plain).double()) <= 1e-6
    assert not grad_of(padded)[V:].any()


def test_entropy_and_accuracy_of_known_distributions():
    # one-hot inputs: the rows of logits are those of W, transposed
    uniform, certain = torch.zeros(4), torch.tensor([50.0, 0, 0, 0])
    W = torch.stack([uniform, certain], 1)
    result = linear_cross_entropy(torch.eye(2), W, torch.tensor([3, 0]))
    # ties count as right: the target has the largest logit, as others do
    assert result.accuracy == 1
    torch.testing.assert_close(result.entropy[0], torch.tensor(4.0).log())
    # -sum p log p = 3 x 50 exp(-50) + 3 exp(-50)
    expected = torch.tensor(153.0).double() * torch.tensor(-50.0).double().exp()
    torch.testing.assert_close(result.entropy[1].double(), expected, rtol=1e-6, atol=0)
    assert linear_cross_entropy(torch.eye(2), W, torch.tensor([3, 1])).accuracy == 0.5
