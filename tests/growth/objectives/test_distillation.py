"""Soft labels, SALT's switch and its choice of data, and self-distillation, each as its formula."""

import pytest
import torch

from apical.growth.objectives import (
    Distillation,
    Salt,
    SelfDistillation,
    SoftLabels,
    median_scores,
    select_by_median_loss,
    soft_labels,
    token_scores,
)
from apical.growth.objectives import _head as head


def kept(probabilities: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return probabilities of the top k alone, renormalised, in all V columns."""
    threshold = probabilities.sort(descending=True).values[:, top_k - 1 : top_k]
    alone = torch.where(probabilities >= threshold, probabilities, 0)
    return alone / alone.sum(-1, keepdim=True)


def untouched(probabilities: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return probabilities of the top k alone, as they are among all."""
    share = probabilities / probabilities.sum(-1, keepdim=True)
    return torch.where(kept(share, top_k) > 0, share, 0)


def dense(labels: SoftLabels, vocabulary: int) -> torch.Tensor:
    return torch.zeros(len(labels.ids), vocabulary, dtype=labels.weights.dtype).scatter_add(
        1, labels.ids, labels.weights
    )


@pytest.mark.parametrize(
    ("top_k", "rho"),
    [
        pytest.param(13, 1.0, id="the whole vocabulary as it is"),
        pytest.param(13, 0.25, id="flattened"),
        pytest.param(4, 2.0, id="a few, sharpened"),
        pytest.param(1, 0.5, id="the best alone"),
    ],
)
@pytest.mark.parametrize("rows", [1, 5, 1000], ids=["row by row", "ragged chunks", "one chunk"])
@pytest.mark.parametrize(("tail", "share"), [("drop", kept), ("label", untouched)])
def test_soft_labels_are_powers_of_the_teachers_probabilities(
    case, monkeypatch, top_k, rho, rows, tail, share
):
    monkeypatch.setattr(head, "_LOGITS", rows * 13)
    labels = soft_labels(case.hidden, case.weight, top_k=top_k, rho=rho, tail=tail, **case.options)
    expected = share(case.logits().softmax(-1) ** rho, top_k)
    torch.testing.assert_close(dense(labels, 13), expected, rtol=1e-12, atol=1e-15)
    assert not labels.weights.requires_grad


def test_half_precision_gives_labels_in_float32(case):
    labels = soft_labels(case.hidden.bfloat16(), case.weight.bfloat16(), top_k=3)
    rounded = case.hidden.bfloat16().double() @ case.weight.bfloat16().double().T
    assert labels.weights.dtype == torch.float32
    expected = kept(rounded.softmax(-1), 3)
    torch.testing.assert_close(dense(labels, 13).double(), expected, rtol=1e-5, atol=1e-6)


def test_no_tokens_and_too_many_labels(case):
    labels = soft_labels(case.hidden[:0], case.weight, top_k=3)
    assert labels.ids.shape == labels.weights.shape == (0, 3)
    with pytest.raises(ValueError, match=r"top_k is 14, but the teacher has 13 tokens"):
        soft_labels(case.hidden, case.weight, top_k=14)


@pytest.mark.parametrize("omega", [0.0, 0.6, 1.0], ids=["labels alone", "both", "teacher alone"])
@pytest.mark.parametrize("tail", ["drop", "label"])
def test_the_loss_is_the_mix_of_both_cross_entropies(case, omega, tail):
    objective = Distillation(omega=omega, rho=0.5, top_k=4, tail=tail, z_loss=1e-2)
    labels = objective.labels(*case.teacher)
    loss = objective(case.hidden, case.weight, case.target, labels=labels, **case.options)
    against_teacher = -(dense(labels, 13) * case.logits().log_softmax(-1)).sum(-1)
    # of the teacher's share, the label has what the top 4 do not
    against_teacher += (1 - labels.weights.sum(-1)) * case.nll()
    each = (1 - omega) * case.nll() + omega * against_teacher + 1e-2 * case.squared_lse()
    case.assert_same(loss, each[case.valid].mean())


def test_without_labels_it_is_next_token_prediction(case):
    objective = Distillation(omega=0.6, z_loss=1e-2)
    loss = objective(case.hidden, case.weight, case.target, labels=None, **case.options)
    each = case.nll() + 1e-2 * case.squared_lse()
    case.assert_same(loss, each[case.valid].mean())


def test_without_a_single_label_the_loss_is_zero(case):
    objective = Distillation(omega=0.6, z_loss=1e-2, top_k=2)
    ignored = torch.full_like(case.target, -100)
    labels = objective.labels(*case.teacher)
    loss = objective(case.hidden, case.weight, ignored, labels=labels, **case.options)
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, case.leaves))


def test_salt_switches_once():
    salt = Salt(steps=3)
    assert [salt.distils(step) for step in range(5)] == [True, True, True, False, False]
    assert not Salt(steps=0).distils(0)


def test_a_teachers_weights_follow_the_models():
    past, present = torch.tensor([2.0, 4.0]), torch.tensor([4.0, 0.0])
    SelfDistillation(decay=0.75).follow([past], [present])
    assert past.tolist() == [2.5, 3.0]
    # what is kept for good is not even touched by a weight that is not finite
    SelfDistillation(decay=1).follow([past], [present * torch.inf])
    assert past.tolist() == [2.5, 3.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distillation(omega=1.5), "omega is 1.5; expected from 0 to 1"),
        (lambda: Salt(steps=1, rho=0.0), "rho is 0.0; expected a positive number"),
        (lambda: Salt(steps=1, top_k=0), "top_k is 0; expected at least 1"),
        (
            lambda: Salt(steps=1, tail="cut"),  # pyright: ignore[reportArgumentType]
            "tail is 'cut'; expected 'drop' or 'label'",
        ),
        (lambda: Salt(steps=-1), "steps is -1; expected 0 or more"),
        (lambda: SelfDistillation(decay=2), "decay is 2; expected from 0 to 1"),
        (lambda: SelfDistillation(z_loss=-1), "z_loss is -1; expected 0 or more"),
    ],
)
def test_values_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


def test_token_scores_are_the_losses_and_ranks(case, monkeypatch):
    # three rows of logits at a time
    monkeypatch.setattr(head, "_LOGITS", 39)
    losses, inside = token_scores(case.hidden, case.weight, case.target, top_k=4, **case.options)
    torch.testing.assert_close(losses, torch.where(case.valid, case.nll().detach(), 0))
    best = case.logits().topk(4).indices
    assert torch.equal(inside, (best == case.target[:, None]).any(-1))
    assert 0 < inside.sum() < case.valid.sum()


def test_a_score_is_the_median_of_masked_losses():
    losses = torch.tensor([5.0, 1.0, 9.0, 7.0, 2.0, 4.0, 8.0, 6.0, 3.0])
    inside = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1]).bool()
    valid = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1, 0]).bool()
    bounds = torch.tensor([0, 3, 3, 5, 6, 8, 9, 9])
    # of 5 1 0; nothing; of 7 2; no label; of 0 0; no label; nothing
    none = -float("inf")
    expected = [1.0, none, 4.5, none, 0.0, none, none]
    assert median_scores(losses, inside, valid, bounds).tolist() == expected


def test_scores_of_many_documents_agree_with_their_own_medians():
    lengths = [6, 1, 17, 2, 9, 30]
    losses, inside = torch.rand(65, dtype=torch.float64), torch.rand(65) < 0.8
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    scores = median_scores(losses, inside, torch.ones(65).bool(), bounds)
    for score, own in zip(scores, (losses * inside).split(lengths), strict=True):
        torch.testing.assert_close(score, own.quantile(0.5))


def test_the_largest_scores_are_kept_in_their_order():
    scores = torch.tensor([1.0, 3.0, -torch.inf, 3.0, 2.0, 3.0])
    # of equal scores the earlier document
    assert select_by_median_loss(scores, keep=2).tolist() == [1, 3]
    assert select_by_median_loss(scores, keep=4).tolist() == [1, 3, 4, 5]
    assert select_by_median_loss(scores, keep=9).tolist() == [0, 1, 2, 3, 4, 5]
    assert select_by_median_loss(scores[:0], keep=2).tolist() == []
    with pytest.raises(ValueError, match=r"keep is -1; expected a number of documents"):
        select_by_median_loss(scores, keep=-1)
