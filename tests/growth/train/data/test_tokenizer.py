"""Tokenizers: lossless, repeatable, stock on disk."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from apical.growth.train.data import tokenizer as module
from apical.growth.train.data.tokenizer import load_tokenizer, plain_encoder, train_tokenizer

TEXTS = [f"the cat number {i} sat on the mat, and the dog {i * 7} ran" for i in range(200)]
# every character that utf-8 can hold
characters = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(cache):
    return train_tokenizer(TEXTS, vocab_size=300, cache=cache)


@given(text=characters)
def test_any_text_comes_back(trained, text):
    ids = plain_encoder(trained).encode(text, add_special_tokens=False).ids
    assert trained.decode(ids) == text
    assert trained.decode(trained(text)["input_ids"]) == text


def test_vocabulary_is_what_was_asked_for(trained):
    assert len(trained) == 300
    assert trained.bos_token_id == trained.eos_token_id == 0
    assert trained.eos_token == "<|endoftext|>"
    assert sorted(trained.get_vocab().values()) == list(range(300))


def test_frequent_words_are_tokens(trained):
    assert " the" in [trained.decode([i]) for i in range(300)]


def test_training_is_repeatable(trained, tmp_path):
    again = train_tokenizer(iter(TEXTS), vocab_size=300, cache=tmp_path)
    assert again.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


def test_trained_once(trained, cache, monkeypatch):
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("trained again"))
    again = train_tokenizer(TEXTS, vocab_size=300, cache=cache)
    assert again.get_vocab() == trained.get_vocab()


@pytest.mark.parametrize(
    ("texts", "vocab_size"),
    [
        pytest.param([*TEXTS, "more"], 300, id="other text"),
        pytest.param(TEXTS, 301, id="other size"),
        pytest.param([TEXTS[0] + TEXTS[1], *TEXTS[2:]], 300, id="other documents of one text"),
    ],
)
def test_other_input_is_another_entry(texts, vocab_size, trained, cache):
    before = len(list((cache / "tokenizers").iterdir()))
    train_tokenizer(texts, vocab_size=vocab_size, cache=cache)
    assert len(list((cache / "tokenizers").iterdir())) == before + 1


def test_saved_directory_is_stock(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert loaded(TEXTS[0])["input_ids"] == trained(TEXTS[0])["input_ids"]
        assert (loaded.bos_token_id, loaded.eos_token_id) == (0, 0)


def test_text_that_names_a_special_token_is_text(trained):
    text = "a <|endoftext|> b"
    assert 0 in trained(text)["input_ids"]
    assert 0 not in plain_encoder(trained).encode(text).ids


def test_plain_encoder_leaves_the_tokenizer_alone(trained):
    before = trained.backend_tokenizer.to_str()
    trained.backend_tokenizer.enable_truncation(2)
    assert len(plain_encoder(trained).encode(TEXTS[0]).ids) > 2
    trained.backend_tokenizer.no_truncation()
    assert trained.backend_tokenizer.to_str() == before


def test_too_little_text_gives_fewer_tokens_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        small = train_tokenizer(["ab"], vocab_size=1000, cache=tmp_path)
    assert len(small) == 258
    assert "too small for more than 258 tokens" in caplog.text


def test_bytes_alone_are_enough(tmp_path):
    assert len(train_tokenizer(["ab ab"], vocab_size=257, cache=tmp_path)) == 257


def test_vocabulary_below_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 256, expected at least 257"):
        train_tokenizer(TEXTS, vocab_size=256, cache=tmp_path)


@pytest.mark.parametrize("texts", [[], ["", ""]], ids=["no document", "empty documents"])
def test_no_text_is_refused(texts, tmp_path):
    with pytest.raises(ValueError, match="texts are empty"):
        train_tokenizer(texts, vocab_size=300, cache=tmp_path)


def test_missing_directories_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    backend = Tokenizer(models.BPE())
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no eos_token"):
        load_tokenizer(tmp_path)
