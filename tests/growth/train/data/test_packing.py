"""Packed batches: boundaries, labels, budgets, and the same stream after every resume."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from apical.growth.continual import Mixture, token_weights
from apical.growth.train.data.packing import BatchStream, eval_batches, pack
from apical.growth.train.data.source import TokenSource

VOCABULARY = 50


def source(name, lengths, seed=0):
    """A source whose tokens are random and whose pieces have these lengths."""
    ids = np.random.default_rng(seed).integers(1, VOCABULARY, sum(lengths)).astype(np.uint16)
    return TokenSource(
        name=name,
        ids=ids,
        lengths=np.array(lengths, dtype=np.int64),
        n_documents=len(lengths),
        n_bytes=1,
        fingerprint="",
    )


SOURCES = {
    "new": source("new", [int(x) for x in np.random.default_rng(1).integers(2, 17, 80)]),
    "old": source("old", [int(x) for x in np.random.default_rng(2).integers(2, 9, 30)], seed=3),
}


def stream(weights=None, *, sources=SOURCES, batch_tokens=40):
    sizes = {name: len(each) for name, each in sources.items()}
    mixture = Mixture(sizes=sizes, weights=weights or {"new": 3, "old": 1}, seed=5)
    return BatchStream(sources, mixture, batch_tokens=batch_tokens)


def same(one, other):
    return (
        torch.equal(one.input_ids, other.input_ids)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.position_ids, other.position_ids)
        and torch.equal(one.cu_seqlens, other.cu_seqlens)
        and (one.max_seqlen, one.sources) == (other.max_seqlen, other.sources)
    )


def pieces_of(batch):
    bounds = batch.cu_seqlens.tolist()
    ids = batch.input_ids[0]
    return [ids[a:b].tolist() for a, b in pairwise(bounds)]


@given(st.lists(st.integers(2, 9), min_size=1, max_size=8))
def test_fields_agree(lengths):
    pieces = [np.arange(length, dtype=np.int64) + 10 * i for i, length in enumerate(lengths)]
    batch = pack(pieces, ["a"] * len(pieces))
    starts = batch.cu_seqlens[:-1].long()
    assert pieces_of(batch) == [piece.tolist() for piece in pieces]
    assert batch.position_ids[0].tolist() == [i for length in lengths for i in range(length)]
    first = torch.zeros(sum(lengths), dtype=torch.bool)
    first[starts] = True
    assert (batch.labels[0][first] == -100).all()
    assert torch.equal(batch.labels[0][~first], batch.input_ids[0][~first])
    assert batch.max_seqlen == max(lengths)
    assert batch.cu_seqlens.dtype == torch.int32
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype} == {torch.int64}


def test_loss_is_on_next_tokens_within_documents_alone():
    lengths = [5, 2, 7, 3]
    batch = pack([np.arange(1, n + 1, dtype=np.int64) for n in lengths], ["a"] * 4)
    logits = torch.randn(1, sum(lengths), VOCABULARY, requires_grad=True)
    loss = ForCausalLMLoss(logits, batch.labels, vocab_size=VOCABULARY)
    (gradient,) = torch.autograd.grad(loss, logits)
    # the last token of a document predicts nothing
    lasts = np.cumsum(lengths) - 1
    expected = [i not in lasts for i in range(sum(lengths))]
    assert gradient[0].abs().sum(-1).gt(0).tolist() == expected
    for i in np.flatnonzero(expected):
        # a gradient is negative at the token that was to be predicted
        assert gradient[0, i].argmin() == batch.input_ids[0, i + 1]


def test_packed_documents_are_trained_like_documents_alone():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).double()
    pieces = [SOURCES["new"].piece(i) for i in range(4)]

    def gradients(batch):
        model.zero_grad()
        predicted = (batch.labels != -100).sum()
        (model(**batch.model_inputs(packed=False)).loss * predicted).backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    packed = gradients(pack(pieces, ["new"] * 4))
    alone = [gradients(pack([piece], ["new"])) for piece in pieces]
    for ours, theirs in zip(packed, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(ours, sum(theirs), rtol=0, atol=1e-10)


def test_model_inputs():
    batch = stream().next()
    plain = batch.model_inputs(packed=False)
    assert set(plain) == {"input_ids", "labels", "position_ids", "use_cache"}
    packed = batch.model_inputs(packed=True)
    assert packed["cu_seq_lens_q"] is packed["cu_seq_lens_k"] is batch.cu_seqlens
    assert packed["max_length_q"] == packed["max_length_k"] == batch.max_seqlen
    assert {name: packed[name] for name in plain} == plain


@pytest.mark.parametrize("before", [0, 1, 7, 60], ids=["start", "one", "epoch 0", "later epoch"])
def test_resume_gives_the_same_batches(before):
    whole = stream()
    for _ in range(before):
        whole.next()
    saved = json.loads(json.dumps(whole.state()))
    rest = [whole.next() for _ in range(20)]
    resumed = stream()
    resumed.load(saved)
    assert all(same(resumed.next(), batch) for batch in rest)


def test_nothing_drawn_is_dropped():
    batches = stream()
    packed = [piece for _ in range(50) for piece in pieces_of(batches.next())]
    sizes = {name: len(each) for name, each in SOURCES.items()}
    mixture = Mixture(sizes=sizes, weights={"new": 3, "old": 1}, seed=5)
    drawn = [mixture.draw() for _ in packed]
    assert packed == [SOURCES[name].piece(index).tolist() for name, index in drawn]


def test_batches_are_as_full_as_the_next_piece_allows():
    batches = stream(batch_tokens=40)
    taken = [batches.next() for _ in range(51)]
    for batch, following in pairwise(taken):
        assert batch.input_ids.shape[1] <= 40
        assert batch.input_ids.shape[1] + len(pieces_of(following)[0]) > 40


def test_an_exactly_full_batch_ends_there():
    sources = {"a": source("a", [8] * 9)}
    batches = stream({"a": 1}, sources=sources, batch_tokens=16)
    assert [batches.next().cu_seqlens.tolist() for _ in range(5)] == [[0, 8, 16]] * 5


def test_token_shares_are_those_asked_for():
    lengths = {name: each.lengths.mean() for name, each in SOURCES.items()}
    batches = stream(token_weights({"new": 0.75, "old": 0.25}, lengths))
    tokens = Counter()
    for _ in range(2000):
        batch = batches.next()
        for name, length in zip(batch.sources, batch.cu_seqlens.diff().tolist(), strict=True):
            tokens[name] += length
    draws = sum(batches.state()["mixture"]["counts"].values())
    # three sigma of the binomial, on the share of draws, doubled for the unequal lengths
    assert abs(tokens["old"] / tokens.total() - 0.25) < 6 * (0.25 / draws) ** 0.5


def test_long_pieces_are_refused_at_once():
    with pytest.raises(ValueError, match="batch_tokens is 15, but source 'new' has a piece of 16"):
        stream(batch_tokens=15)
    with pytest.raises(ValueError, match="batch_tokens is 15, but source 'new'"):
        eval_batches(SOURCES["new"], tokens=100, batch_tokens=15)


def test_sources_must_be_the_mixtures():
    mixture = Mixture(sizes={"new": 80, "old": 29}, weights={"new": 1}, seed=0)
    with pytest.raises(ValueError, match="the mixture knows"):
        BatchStream(SOURCES, mixture, batch_tokens=40)


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        pytest.param(1, 1, id="less than a piece"),
        pytest.param(5, 1, id="exactly a piece"),
        pytest.param(6, 1, id="not quite two"),
        pytest.param(9, 2, id="exactly two"),
        pytest.param(25, 5, id="several batches"),
        pytest.param(10**6, 7, id="more than there is"),
    ],
)
def test_eval_batches_are_the_first_pieces(tokens, pieces):
    text = source("a", [5, 4, 3, 6, 7, 2, 5])
    batches = eval_batches(text, tokens=tokens, batch_tokens=9)
    found = [piece for batch in batches for piece in pieces_of(batch)]
    assert found == [text.piece(i).tolist() for i in range(pieces)]
    assert all(batch.input_ids.shape[1] <= 9 for batch in batches)
    assert {name for batch in batches for name in batch.sources} == {"a"}


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="source 'a' is empty"):
        eval_batches(source("a", []), tokens=10, batch_tokens=10)
