"""Losses per document: the plain mean over each document's labelled tokens."""

import pytest
import torch

from apical.growth.objectives import document_losses
from apical.growth.objectives.documents import document_of_tokens

LENGTHS = {
    "one document": [7],
    "ragged, with single tokens": [1, 5, 2, 1, 8],
    "empty documents at both ends and between": [0, 3, 0, 0, 4, 0],
    "no document": [],
}


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_each_mean_is_over_the_documents_own_labels(lengths: list[int]):
    total = sum(lengths)
    losses = torch.rand(total, dtype=torch.float64)
    valid = torch.arange(total) % 3 != 0
    # what is not labelled is never read
    means, tokens = document_losses(torch.where(valid, losses, torch.nan), valid, bounds(lengths))
    for number, (own, mask) in enumerate(
        zip(losses.split(lengths), valid.split(lengths), strict=True) if lengths else ()
    ):
        expected = own[mask].mean() if mask.any() else torch.zeros(())
        torch.testing.assert_close(means[number], expected.double(), rtol=1e-15, atol=0)
        assert tokens[number] == mask.sum()
    assert means.shape == tokens.shape == (len(lengths),)


def test_a_large_neighbour_costs_no_digits():
    # a difference of running sums would lose them
    losses = torch.tensor([1e12, 1e12, 1e-6, 3e-6], dtype=torch.float32)
    means, _ = document_losses(losses, torch.ones(4, dtype=torch.bool), bounds([2, 2]))
    torch.testing.assert_close(means[1].item(), 2e-6, rtol=1e-7, atol=0)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_token_knows_its_document(lengths: list[int]):
    owners = document_of_tokens(bounds(lengths), sum(lengths) + 2)
    expected = [n for n, length in enumerate(lengths) for _ in range(length)]
    # two tokens more than there are documents for
    assert owners.tolist() == [*expected, len(lengths), len(lengths)]


def test_losses_get_no_gradient_through_the_monitor():
    losses = torch.rand(3, requires_grad=True)
    assert not document_losses(losses, losses > 0, bounds([3])).mean.requires_grad
