"""Weights of documents by their losses: the formulas, their edges, and two ranks as one."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apical.growth.objectives import Reweighted, document_weights

FORMULAS = {
    "linupper": lambda h: min(h + 1, 1),
    "quadratic": lambda h: 1 - h * h,
    "extremes": abs,
}
LENGTHS = [5, 1, 0, 9, 4, 4]


def plain(losses: list[float], strategy: str, temperature: float) -> list[float]:
    """Return the weights as the formula says, one document after the other."""
    middle, spread = (max(losses) + min(losses)) / 2, max(max(losses) - min(losses), 1e-6)
    scores = [FORMULAS[strategy](2 * (loss - middle) / spread) for loss in losses]
    powers = [math.exp((score - max(scores)) / temperature) for score in scores]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("strategy", FORMULAS)
@pytest.mark.parametrize(
    "temperature", [pytest.param(1.0, id="usual"), pytest.param(1e-3, id="nearly-one-document")]
)
def test_weights_are_those_of_the_formula(strategy, temperature):
    losses = [3.0, 1.0, 2.5, 1.75, 3.0]
    weights = document_weights(
        torch.tensor(losses),
        torch.ones(5).bool(),
        strategy=strategy,
        temperature=temperature,
    )
    expected = torch.tensor(plain(losses, strategy, temperature), dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("strategy", FORMULAS)
@pytest.mark.parametrize(
    ("losses", "temperature"),
    [
        pytest.param([2.0], 1.0, id="one-document"),
        pytest.param([2.0, 2.0, 2.0], 0.1, id="equal-losses"),
        pytest.param([0.5, 2.0, 9.0], math.inf, id="burn-in"),
    ],
)
def test_weights_are_uniform(strategy, losses, temperature):
    has_label = torch.ones(len(losses)).bool()
    weights = document_weights(
        torch.tensor(losses), has_label, strategy=strategy, temperature=temperature
    )
    expected = torch.full_like(weights, 1 / len(losses))
    torch.testing.assert_close(weights, expected, rtol=1e-14, atol=0)


def test_documents_without_a_label_are_left_out():
    losses = torch.tensor([1.0, torch.nan, 3.0])
    has_label = torch.tensor([True, False, True])
    weights = document_weights(losses, has_label)
    assert weights[1] == 0
    expected = plain([1.0, 3.0], "linupper", 1.0)
    torch.testing.assert_close(weights[[0, 2]], torch.tensor(expected, dtype=torch.float64))
    assert document_weights(losses, torch.zeros(3).bool()).tolist() == [0, 0, 0]
    assert document_weights(losses[:0], has_label[:0]).tolist() == []


def test_a_loss_that_is_not_finite_is_not_hidden():
    weights = document_weights(torch.tensor([1.0, torch.nan]), torch.ones(2).bool())
    assert weights.isnan().all()


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("strategy", FORMULAS)
def test_loss_and_gradients_are_those_of_the_weighted_means(case, strategy):
    objective = Reweighted(strategy=strategy, temperature=0.5, z_loss=1e-2)
    loss = objective(
        case.hidden, case.weight, case.target, cu_seqlens=bounds(LENGTHS), **case.options
    )
    nll, each = case.nll(), case.nll() + 1e-2 * case.squared_lse()
    labelled = [m for m in case.valid.split(LENGTHS) if m.any()]
    # single and empty documents without a label are among them
    assert len(labelled) < len(LENGTHS)
    parts = [
        (nll_n[m].mean().item(), each_n[m].mean())
        for nll_n, each_n, m in zip(
            nll.split(LENGTHS), each.split(LENGTHS), case.valid.split(LENGTHS), strict=True
        )
        if m.any()
    ]
    weights = plain([mean for mean, _ in parts], strategy, 0.5)
    expected = sum(w * mean for w, (_, mean) in zip(weights, parts, strict=True))
    case.assert_same(loss, expected)


def test_one_document_is_the_plain_mean(case):
    loss = Reweighted()(
        case.hidden, case.weight, case.target, cu_seqlens=bounds([23]), **case.options
    )
    case.assert_same(loss, case.nll()[case.valid].mean())


@pytest.mark.parametrize(
    "lengths",
    [pytest.param(LENGTHS, id="documents"), pytest.param([], id="tokens of no document")],
)
def test_without_a_label_loss_and_gradients_are_zero(case, lengths):
    ignored = torch.full_like(case.target, -100) if lengths else case.target
    loss = Reweighted()(
        case.hidden, case.weight, ignored, cu_seqlens=bounds(lengths), **case.options
    )
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, case.leaves))


def test_the_temperature_is_a_function_of_the_step():
    constant = Reweighted(temperature=2.0, burn_in=2)
    assert [constant.temperature_at(step) for step in range(4)] == [math.inf, math.inf, 2, 2]
    # reaches its end at the last step and stays
    falling = Reweighted(temperature=2.0, final_temperature=0.5, burn_in=1, steps=5)
    expected = [math.inf, 2.0, 1.5, 1.0, 0.5, 0.5]
    assert [falling.temperature_at(step) for step in range(6)] == pytest.approx(expected)
    single = Reweighted(temperature=2.0, final_temperature=0.5, burn_in=1, steps=2)
    assert single.temperature_at(1) == 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Reweighted(strategy="upper"),  # pyright: ignore[reportArgumentType]
            "strategy is 'upper'; expected one of linupper, quadratic, extremes",
        ),
        (lambda: Reweighted(temperature=0), "temperature is 0; expected a positive number"),
        (
            lambda: Reweighted(final_temperature=0.5),
            "steps is 0; expected more than burn_in where there is a final_temperature",
        ),
        (
            lambda: Reweighted(final_temperature=-1, steps=3),
            "final_temperature is -1; expected a positive number, or None",
        ),
        (lambda: Reweighted(burn_in=-1), "burn_in is -1; expected 0 or more"),
    ],
)
def test_values_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


WORKER = """
import json, sys, torch
import torch.distributed as dist
from apical.growth.objectives import Reweighted

rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
draw = torch.Generator().manual_seed(1)
hidden = torch.randn(20, 5, generator=draw, dtype=torch.float64)
weight = torch.randn(13, 5, generator=draw, dtype=torch.float64)
target = torch.randint(13, (20,), generator=draw)
target[::6] = -100
results = {}
# documents of 4, 7, 0, 3 and 6 tokens: cut between two of them, or all on the second rank
cuts = {"shared": ([4, 7], [0, 3, 6]), "lopsided": ([], [4, 7, 0, 3, 6])}
for name, lengths in cuts.items():
    middle = sum(lengths[0])
    mine = slice(0, middle) if rank == 0 else slice(middle, 20)
    lengths, mine = (lengths[rank], mine) if ranks == 2 else (lengths[0] + lengths[1], slice(0, 20))
    for strategy in ("linupper", "quadratic", "extremes"):
        h, w = hidden[mine].clone().requires_grad_(), weight.clone().requires_grad_()
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        objective = Reweighted(strategy=strategy, temperature=0.3, z_loss=1e-2)
        loss = objective(h, w, target[mine], cu_seqlens=bounds)
        loss.backward()
        results[f"{name} {strategy}"] = [loss.item(), h.grad.tolist(), w.grad.tolist()]
print(json.dumps(results))
dist.destroy_process_group()
"""


def run(ranks: int, store: Path) -> list[dict[str, list]]:
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors
    return [json.loads(out) for out, _ in outputs]


def test_two_ranks_are_one_rank_with_all_documents(tmp_path):
    (whole,), halves = run(1, tmp_path / "one"), run(2, tmp_path / "two")
    assert len(whole) == 6
    for name, (loss, grad_hidden, grad_weight) in whole.items():
        first, second = (half[name] for half in halves)
        # data parallel training takes the mean over ranks
        assert (first[0] + second[0]) / 2 == pytest.approx(loss, rel=1e-12)
        found = torch.tensor(first[1] + second[1]) / 2
        torch.testing.assert_close(found, torch.tensor(grad_hidden))
        found = (torch.tensor(first[2]) + torch.tensor(second[2])) / 2
        torch.testing.assert_close(found, torch.tensor(grad_weight))
