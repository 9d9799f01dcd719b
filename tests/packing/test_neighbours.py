"""Neighbours by cosine against all pairs in float64; an embedding of text without a model."""

import pytest
import torch

from apical.packing import hashed_embeddings, nearest_neighbours


def by_all_pairs(embeddings: torch.Tensor, k: int) -> list[list[int]]:
    x = embeddings.double()
    cosines = (x @ x.T) / (x.norm(dim=1)[:, None] * x.norm(dim=1)).clamp(min=1e-300)
    steps = (cosines * 2**20).round().tolist()
    others = [
        sorted(set(range(len(x))) - {i}, key=lambda j: (-row[j], j)) for i, row in enumerate(steps)
    ]
    return [row[:k] for row in others]


@pytest.mark.parametrize(
    "block",
    [1, 7, 23, 64],  # one document; ragged; all but one block full; more than there are
)
@pytest.mark.parametrize("k", [1, 9, 49])  # 49: all others
def test_neighbours_are_those_of_all_pairs(block, k):
    # directions far from each other's rounding, of very different norms
    embeddings = torch.randn(50, 4) * torch.logspace(-3, 3, 50)[:, None]
    found = nearest_neighbours(embeddings, k, block=block)
    assert found.dtype == torch.int64
    assert found.tolist() == by_all_pairs(embeddings, k)


@pytest.mark.parametrize("block", [2, 5, 100])
def test_ties_go_to_the_lower_index(block):
    # three directions over and over, and documents without one
    embeddings = torch.eye(4)[torch.arange(24) % 4]
    embeddings[:, 3] = 0
    assert nearest_neighbours(embeddings, 10, block=block).tolist() == by_all_pairs(embeddings, 10)


def test_halves_are_embeddings_too():
    embeddings = torch.eye(5, dtype=torch.float16)
    assert nearest_neighbours(embeddings, 2).tolist() == by_all_pairs(embeddings, 2)


@pytest.mark.parametrize(
    ("embeddings", "k", "message"),
    [
        (torch.ones(3), 1, r"embeddings are torch.float32 \(3,\), expected \(N, d\) floating"),
        (torch.ones(3, 2, dtype=torch.long), 1, r"embeddings are torch.int64"),
        (torch.tensor([[1.0], [float("nan")]]), 1, r"NaN or infinity"),
        (torch.ones(3, 2), 3, r"k is 3, expected 1 to 2: there are 3 documents"),
        (torch.ones(3, 2), 0, r"k is 0"),
    ],
)
def test_what_cannot_be_searched_is_refused(embeddings, k, message):
    with pytest.raises(ValueError, match=message):
        nearest_neighbours(embeddings, k)


TEXTS = [
    "The cat sat on the mat.",
    "Interest rates rose in the last quarter.",
    "A cat and another cat sat.",
    "Banks raised interest rates again last quarter",
    "",
]


def test_texts_that_share_words_are_alike():
    vectors = hashed_embeddings(TEXTS)
    assert vectors.shape == (5, 2048)
    assert vectors.dtype == torch.float32
    nearest = nearest_neighbours(vectors, 1).flatten().tolist()
    assert nearest[:4] == [2, 3, 0, 1]
    norms = vectors.norm(dim=1)
    assert torch.allclose(norms[:4], torch.ones(4))
    assert norms[4] == 0


def test_case_and_punctuation_do_not_matter_but_order_does():
    one, same, other = hashed_embeddings(["Dogs bite men", "dogs, bite MEN!", "men bite dogs"])
    assert torch.equal(one, same)
    assert 0.3 < one @ other < 0.9


def test_rare_words_weigh_more():
    texts = ["the whale", "the whale", *["the"] * 20]
    vectors = hashed_embeddings([*texts, "the ship"])
    assert vectors[0] @ vectors[1] > 0.99
    assert vectors[0] @ vectors[-1] < 0.3


def test_embeddings_are_the_same_in_every_process():
    # places and signs come from CRC-32, not from Python's salted hash
    one, other = hashed_embeddings(["b", "cat"], size=16).tolist()
    # 0x71beeff9: the highest bit is 0, the lowest four are 9; 0x9e5e43a8: 1 and 8
    assert one == [-1.0 * (place == 9) for place in range(16)]
    assert other == [1.0 * (place == 8) for place in range(16)]


def test_terms_in_one_place_add_up():
    # the signs of "cat", "dog" and "cat dog" are +, + and -
    assert hashed_embeddings(["cat dog"], size=1).tolist() == [[1.0]]


def test_any_unicode_is_text():
    vectors = hashed_embeddings(["naïve 数据", "\ud800 lone"], size=64)
    assert vectors.isfinite().all()
    with pytest.raises(ValueError, match=r"size is 0"):
        hashed_embeddings(["a"], size=0)
