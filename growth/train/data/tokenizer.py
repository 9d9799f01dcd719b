"""A tokenizer trained on the run's own text, or loaded from a directory; never downloaded."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from apical._extras import require

from .cache import cached

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
# the 256 bytes and the end of a text
_SMALLEST = 257
# raise it whenever the same text would give another tokenizer
_FORMAT = 1


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, cache: Path
) -> "PreTrainedTokenizerFast":
    """Return a byte-level BPE tokenizer; the same texts give the same one, trained once.

    Any text can be encoded and comes back as it was. `<|endoftext|>` is id 0 and serves as
    both beginning and end.

    Args:
        texts: documents to train on; their order does not matter to the merges.
        vocab_size: tokens, at least 257; fewer come out of a text too small for more.
        cache: root of the cache, usually `cache_dir()`.

    Raises:
        ValueError: vocab_size is below 257, or there is no text.
    """
    if vocab_size < _SMALLEST:
        raise ValueError(f"vocab_size is {vocab_size}, expected at least {_SMALLEST}")
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("texts are empty: there is nothing to train a tokenizer on")
    path = cache / "tokenizers" / _key(texts, vocab_size)
    return load_tokenizer(cached(path, lambda each: _build(each, texts, vocab_size)))


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a directory that `save_pretrained` wrote.

    Raises:
        FileNotFoundError: there is no such directory, or no tokenizer in it.
        ValueError: it has no fast tokenizer, or no end-of-text token.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"tokenizer {path}: no such directory")
    if not (path / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"tokenizer {path}: has no tokenizer_config.json")
    transformers = require("transformers", extra="train", what="loading a tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {path} is not a fast one: save it with tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {path} has no eos_token, which ends every document")
    return tokenizer


def plain_encoder(tokenizer: "PreTrainedTokenizerFast") -> "Tokenizer":
    """Return a copy of the backend that cuts, pads and adds nothing, and for which text is text.

    A document that says "<|endoftext|>" is about that token and does not end there.
    """
    tokenizers = require("tokenizers", extra="train", what="encoding text")
    encoder = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def _key(texts: list[str], vocab_size: int) -> str:
    digest = hashlib.sha256(f"{_FORMAT}:{vocab_size}".encode())
    for text in texts:
        encoded = text.encode()
        # the length keeps ("ab", "c") apart from ("a", "bc")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()[:32]


def _build(directory: Path, texts: list[str], vocab_size: int) -> None:
    transformers = require("transformers", extra="train", what="training a tokenizer")
    backend = _train(texts, vocab_size)
    if backend.get_vocab_size() < vocab_size:
        _log.warning(
            "vocab_size=%d, but the text is too small for more than %d tokens",
            vocab_size,
            backend.get_vocab_size(),
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)


def _train(texts: list[str], vocab_size: int) -> "Tokenizer":
    tokenizers = require("tokenizers", extra="train", what="training a tokenizer")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = byte_level
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer, length=len(texts))
    return backend
