"""A source of tokens: documents encoded once, kept on disk, read as pieces of the context."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from .cache import cached
from .corpora import build_corpus, read_corpus
from .files import find_files, load_documents
from .tokenizer import plain_encoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_log = logging.getLogger(__name__)

Split = Literal["train", "val"]

# raise it whenever the same documents would give other token files
_FORMAT = 1
# documents encoded at once
_BATCH = 256
# one token has no label, and a document may end one token after a full piece
_SHORTEST_CONTEXT = 3


class SourceSpec(Protocol):
    """What a recipe says of a source: a local corpus, or files."""

    @property
    def corpus(self) -> str | None: ...
    @property
    def max_bytes(self) -> int | None: ...
    @property
    def files(self) -> Sequence[str] | None: ...
    @property
    def text_field(self) -> str: ...
    @property
    def validation(self) -> float: ...


@dataclass(frozen=True, eq=False)
class TokenSource:
    """Pieces of documents, each at most a context long; together they are the documents.

    A document begins with the tokenizer's beginning-of-text token and ends with its
    end-of-text token. `fingerprint` identifies tokens and pieces; `n_bytes` counts the
    documents' UTF-8 bytes, `n_documents` the documents.
    """

    name: str
    ids: np.ndarray = field(repr=False)
    lengths: np.ndarray = field(repr=False)
    n_documents: int
    n_bytes: int
    fingerprint: str
    _starts: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)
        object.__setattr__(self, "_starts", starts)

    def __len__(self) -> int:
        return len(self.lengths)

    def piece(self, index: int) -> np.ndarray:
        """Return the tokens of one piece, int64."""
        start = self._starts[index]
        return self.ids[start : start + self.lengths[index]].astype(np.int64)

    def choose(self, pieces: np.ndarray) -> "TokenSource":
        """Return a source of some of the pieces, over the same tokens and counts of documents.

        Shapes: pieces (any number,) int64, their numbers.
        """
        digest = hashlib.sha256(self.fingerprint.encode() + pieces.astype("<i8").tobytes())
        chosen = replace(self, lengths=self.lengths[pieces], fingerprint=digest.hexdigest())
        object.__setattr__(chosen, "_starts", self._starts[pieces])
        return chosen

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token that can be predicted: all but documents' first.

        Loss in nats per token / ln 2 / this is the loss in bits per byte.
        """
        return self.n_bytes / (len(self.ids) - self.n_documents)


def load_source(
    name: str,
    spec: SourceSpec,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    split: Split,
    context: int,
    cache: Path,
) -> TokenSource:
    """Return one split of a source as tokens, encoded at the first call and then memory-mapped.

    Documents longer than `context` are cut, and nothing of them is lost.

    Args:
        name: of the source, for messages and for the mixture.
        spec: a recipe's source.
        tokenizer: a fast one with an end-of-text token.
        split: "train" or "val".
        context: most tokens of a piece, at least 3.
        cache: root of the cache, usually `cache_dir()`.

    Raises:
        ValueError, OSError: as `source_texts`; or the context is too short.
    """
    if context < _SHORTEST_CONTEXT:
        raise ValueError(f"context is {context}, expected at least {_SHORTEST_CONTEXT} tokens")
    texts = source_texts(name, spec, split=split, cache=cache)
    key = _fingerprint(texts, tokenizer)
    path = cache / "tokens" / key[:32]
    cached(path, lambda each: _encode(each, texts, tokenizer), is_intact=_is_intact)
    ids, documents, n_bytes = _open(path)
    return TokenSource(
        name=name,
        ids=ids,
        lengths=cut(documents, context=context),
        n_documents=len(documents),
        n_bytes=n_bytes,
        fingerprint=hashlib.sha256(f"{key}:{context}".encode()).hexdigest(),
    )


def source_texts(name: str, spec: SourceSpec, *, split: Split, cache: Path) -> Sequence[str]:
    """Return the documents of one split of a source.

    Documents from files are held out by the hash of their text, a share `validation` of them
    and at least one; so equal documents are in one split, and adding others moves none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the text is empty, binary or too little for this split, or the corpus unknown.
    """
    if spec.corpus is not None:
        directory = build_corpus(spec.corpus, cache=cache, max_bytes=spec.max_bytes)
        return list(read_corpus(directory, split))
    paths = find_files(spec.files or ())
    dataset = load_documents(paths, text_field=spec.text_field, cache=cache)
    held_out = _held_out(dataset["text"], spec.validation)
    chosen = np.flatnonzero(held_out == (split == "val"))
    if len(chosen) == 0:
        raise ValueError(
            f"source {name!r}: none of its {len(held_out)} documents falls to {split}; "
            "add documents, or change `validation`"
        )
    return dataset.select(chosen)["text"]


def cut(documents: np.ndarray, *, context: int) -> np.ndarray:
    """Return the lengths of the pieces of documents, in order, each from 2 to `context` tokens.

    Pieces are full but for a document's last; one token left over takes a second one along.

    Shapes: documents (N,) lengths of at least 2; result (pieces,) int64.
    """
    counts = -(-documents // context)
    pieces = np.full(counts.sum(), context, dtype=np.int64)
    last = np.cumsum(counts) - 1
    pieces[last] = documents - (counts - 1) * context
    lonely = last[pieces[last] == 1]
    pieces[lonely] += 1
    pieces[lonely - 1] -= 1
    return pieces


def _held_out(texts: Sequence[str], share: float) -> np.ndarray:
    places = np.array([_place(text) for text in texts])
    held_out = places < share
    # few documents: at least the first is held out, and at least the last is not
    if not held_out.any():
        held_out = places == places.min()
    return held_out & (places < places.max()) if held_out.all() else held_out


def _place(text: str) -> float:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64


def _ends(tokenizer: "PreTrainedTokenizerFast") -> tuple[int, int]:
    end = tokenizer.eos_token_id
    begin = tokenizer.bos_token_id
    # many tokenizers have one token for both
    begin = end if begin is None else begin
    assert isinstance(begin, int)
    assert isinstance(end, int)
    return begin, end


def _fingerprint(texts: Sequence[str], tokenizer: "PreTrainedTokenizerFast") -> str:
    identity = [_FORMAT, plain_encoder(tokenizer).to_str(), _ends(tokenizer)]
    digest = hashlib.sha256(json.dumps(identity).encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def _encode(directory: Path, texts: Sequence[str], tokenizer: "PreTrainedTokenizerFast") -> None:
    _log.info("encoding %d documents", len(texts))
    encoder, ends = plain_encoder(tokenizer), _ends(tokenizer)
    largest = max(*encoder.get_vocab(with_added_tokens=True).values(), *ends)
    dtype = np.dtype(np.uint16 if largest < 2**16 else np.uint32)
    lengths: list[int] = []
    with (directory / "ids.bin").open("wb") as file:
        for ids in _encoded(encoder, ends, texts):
            np.array(ids, dtype=dtype).tofile(file)
            lengths.append(len(ids))
    np.save(directory / "lengths.npy", np.array(lengths, dtype=np.int64))
    n_bytes = sum(len(text.encode()) for text in texts)
    meta = {"dtype": dtype.name, "n_bytes": n_bytes}
    (directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _encoded(
    encoder: "Tokenizer", ends: tuple[int, int], texts: Sequence[str]
) -> Iterator[list[int]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, _BATCH)):
        for encoding in encoder.encode_batch_fast(batch, add_special_tokens=False):
            yield [ends[0], *encoding.ids, ends[1]]


def _open(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    ids = np.memmap(path / "ids.bin", dtype=meta["dtype"], mode="r")
    return ids, np.load(path / "lengths.npy"), meta["n_bytes"]


def _is_intact(path: Path) -> bool:
    try:
        ids, documents, _ = _open(path)
    except (OSError, ValueError, KeyError):
        return False
    return len(ids) == documents.sum()
