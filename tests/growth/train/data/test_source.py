"""Sources: nothing lost, nothing held out and trained on, every bad file named in one line."""

import json
import re
import socket
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apical.growth.train.data import files
from apical.growth.train.data import source as data
from apical.growth.train.data.source import cut, load_source, source_texts
from apical.growth.train.data.tokenizer import train_tokenizer

WORDS = re.findall(
    "[a-z]+", "the cat sat on the mat and then it ran to the other side of the house"
)


@dataclass(frozen=True)
class Spec:
    files: tuple[str, ...] | None = None
    corpus: str | None = None
    max_bytes: int | None = None
    text_field: str = "text"
    validation: float = 0.2


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("reading local files opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(
        [" ".join(WORDS)] * 3, vocab_size=280, cache=tmp_path_factory.mktemp("t")
    )


def texts(count, words=30):
    return [
        " ".join([str(i), *np.random.default_rng(i).choice(WORDS, i % words + 1)])
        for i in range(count)
    ]


def written(path, content):
    """Write texts the way the file's suffix says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": content}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in content))
    else:
        path.write_text(content[0])
    return path


@pytest.fixture
def spec(tmp_path):
    return Spec(files=(str(written(tmp_path / "rows.jsonl", texts(100))),))


def load(spec, tokenizer, cache, *, split: data.Split = "train", context=16):
    return load_source("mine", spec, tokenizer, split=split, context=context, cache=cache)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt", ".md"])
def test_splits_are_the_documents(suffix, tmp_path):
    content = texts(40)
    if suffix in (".txt", ".md"):
        for i, text in enumerate(content):
            written(tmp_path / f"{i:02d}{suffix}", [text])
    else:
        written(tmp_path / f"first{suffix}", content[:25])
        written(tmp_path / f"second{suffix}", content[25:])
    spec = Spec(files=(f"{tmp_path}/*{suffix}",))
    train, held_out = (
        list(source_texts("mine", spec, split=split, cache=tmp_path / "cache"))
        for split in ("train", "val")
    )
    assert sorted(train + held_out) == sorted(content)
    assert 0 < len(held_out) < 20


def test_adding_documents_moves_none(spec, tmp_path):
    before = set(source_texts("mine", spec, split="val", cache=tmp_path))
    more = written(tmp_path / "more.jsonl", texts(300)[100:])
    larger = Spec(files=(*spec.files, str(more)))
    after = set(source_texts("mine", larger, split="val", cache=tmp_path))
    assert before < after
    assert 0.1 < len(after) / 300 < 0.3


def test_equal_documents_stay_together(tmp_path):
    path = written(tmp_path / "twice.jsonl", texts(50) * 2)
    spec = Spec(files=(str(path),), validation=0.5)
    train, held_out = (
        set(source_texts("mine", spec, split=split, cache=tmp_path)) for split in ("train", "val")
    )
    assert train
    assert not train & held_out


@pytest.mark.parametrize(
    ("validation", "held_out"),
    [pytest.param(1e-9, 1, id="too small a share"), pytest.param(1 - 1e-9, 2, id="too large")],
)
def test_few_documents_still_give_both_splits(validation, held_out, tmp_path):
    path = written(tmp_path / "few.jsonl", texts(3))
    spec = Spec(files=(str(path),), validation=validation)
    counts = {
        split: len(source_texts("mine", spec, split=split, cache=tmp_path))
        for split in ("train", "val")
    }
    assert counts == {"train": 3 - held_out, "val": held_out}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("\n\n".join(texts(2000)), id="paragraphs"),
        pytest.param("\n".join(texts(2000)), id="lines without paragraphs"),
    ],
)
def test_one_text_file_is_cut_into_sections(text, tmp_path):
    spec = Spec(files=(str(written(tmp_path / "book.txt", [text])),))
    sections = [
        section
        for split in ("train", "val")
        for section in source_texts("mine", spec, split=split, cache=tmp_path)
    ]
    assert len(sections) > 10
    assert sum(map(len, sections)) == len(text)
    assert all(section in text for section in sections)
    assert max(map(len, sections)) < 10_000


def test_line_ends_and_byte_order_marks_are_no_text(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo %d" % i)
    spec = Spec(files=(f"{tmp_path}/*.txt",))
    found = [*chain(*(source_texts("m", spec, split=s, cache=tmp_path) for s in ("train", "val")))]
    assert sorted(found) == ["one\ntwo 0", "one\ntwo 1"]


def test_rows_may_differ_in_their_other_fields(tmp_path):
    rows = [{"text": "a b", "meta": 1}, {"meta": {"x": []}, "text": "c d"}, {"text": "e", "y": 1}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    spec = Spec(files=(str(path),))
    assert len(source_texts("mine", spec, split="train", cache=tmp_path)) == 2


def test_a_changed_file_is_read_again(spec, tmp_path):
    before = list(source_texts("mine", spec, split="train", cache=tmp_path))
    written(tmp_path / "rows.jsonl", texts(101)[1:])
    after = list(source_texts("mine", spec, split="train", cache=tmp_path))
    assert set(after) <= {*texts(101)[1:]}
    assert after != before


def test_an_unchanged_file_is_read_once(spec, tmp_path, monkeypatch):
    source_texts("mine", spec, split="train", cache=tmp_path)
    monkeypatch.setattr(files, "_read", lambda *_, **__: pytest.fail("read again"))
    assert len(source_texts("mine", spec, split="val", cache=tmp_path)) > 0


@pytest.mark.parametrize("context", [3, 4, 16, 10_000], ids=["least", "even", "usual", "whole"])
def test_pieces_together_are_the_documents(context, spec, tokenizer, tmp_path):
    source = load(spec, tokenizer, tmp_path, context=context)
    pieces = [source.piece(i) for i in range(len(source))]
    expected = [
        [0, *tokenizer(text)["input_ids"], 0]
        for text in source_texts("mine", spec, split="train", cache=tmp_path)
    ]
    assert np.concatenate(pieces).tolist() == [*chain(*expected)]
    assert [len(piece) for piece in pieces] == source.lengths.tolist()
    assert {piece.dtype for piece in pieces} == {np.dtype(np.int64)}
    # every document's beginning is a piece's beginning
    ends = np.cumsum(source.lengths)
    assert set(np.cumsum([len(ids) for ids in expected])) <= set(ends)
    assert source.n_documents == len(expected)


@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=20).map(np.array),
    st.integers(3, 12),
)
def test_cut_keeps_every_token_and_a_label_in_each_piece(documents, context):
    pieces = cut(documents, context=context)
    assert pieces.min() >= 2
    assert pieces.max() <= context
    assert set(np.cumsum(documents)) <= set(np.cumsum(pieces))
    assert pieces.sum() == documents.sum()
    # no more pieces than needed
    assert len(pieces) == sum(-(-length // context) for length in documents)


def test_bytes_per_token(spec, tokenizer, tmp_path):
    source = load(spec, tokenizer, tmp_path)
    documents = list(source_texts("mine", spec, split="train", cache=tmp_path))
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in documents)
    assert source.n_bytes == sum(len(text.encode()) for text in documents)
    assert source.bytes_per_token == pytest.approx(source.n_bytes / tokens)


def test_tokens_are_encoded_once_and_stay_on_disk(spec, tokenizer, tmp_path, monkeypatch):
    first = load(spec, tokenizer, tmp_path)
    monkeypatch.setattr(data, "_encode", lambda *_: pytest.fail("encoded again"))
    again = load(spec, tokenizer, tmp_path)
    assert isinstance(again.ids, np.memmap)
    assert again.fingerprint == first.fingerprint
    # another context cuts the same tokens
    assert load(spec, tokenizer, tmp_path, context=8).fingerprint != first.fingerprint


def test_damaged_tokens_are_encoded_again(spec, tokenizer, tmp_path):
    whole = np.array(load(spec, tokenizer, tmp_path).ids)
    (ids,) = tmp_path.glob("tokens/*/ids.bin")
    ids.write_bytes(ids.read_bytes()[:-2])
    assert np.array_equal(load(spec, tokenizer, tmp_path).ids, whole)


def test_fingerprint_follows_text_and_tokenizer(spec, tokenizer, tmp_path):
    other = train_tokenizer(WORDS, vocab_size=260, cache=tmp_path)
    fingerprints = {
        load(spec, tokenizer, tmp_path).fingerprint,
        load(spec, tokenizer, tmp_path, split="val").fingerprint,
        load(spec, other, tmp_path).fingerprint,
    }
    assert len(fingerprints) == 3


def test_text_that_names_the_end_does_not_end(tokenizer, tmp_path):
    path = written(tmp_path / "rows.jsonl", ["a <|endoftext|> b", "c <|endoftext|> d"])
    source = load(Spec(files=(str(path),)), tokenizer, tmp_path, context=100)
    assert source.piece(0).tolist().count(0) == 2


def test_corpus_sources(tokenizer, tmp_path):
    spec = Spec(corpus="code", max_bytes=100_000)
    train = load(spec, tokenizer, tmp_path, context=64)
    held_out = load(spec, tokenizer, tmp_path, split="val", context=64)
    assert 80_000 < train.n_bytes + held_out.n_bytes <= 100_000
    assert train.lengths.max() == 64
    assert train.n_bytes > 5 * held_out.n_bytes


GOOD = '{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.txt", b"", "a.txt is empty", id="empty text"),
        pytest.param("a.md", b" \n\t\n", "a.md is empty", id="white text"),
        pytest.param("a.jsonl", b"\n", "a.jsonl is empty", id="empty lines"),
        pytest.param("a.jsonl", b'{"text": ""}', "a.jsonl is empty", id="empty documents"),
        pytest.param("a.txt", b"ab\x00c", "a.txt is not text: byte 2 is zero", id="zero byte"),
        pytest.param("a.txt", b"ab\xff", "a.txt is not text: byte 2 is not UTF-8", id="latin"),
        pytest.param(
            "a.jsonl", GOOD.encode() + b'{"text": "\xff"}', "a.jsonl:2 is not text", id="latin line"
        ),
        pytest.param("a.jsonl", GOOD + "{text}", "a.jsonl:2: not JSON", id="broken line"),
        pytest.param("a.jsonl", GOOD + "[1]", "a.jsonl:2: no field 'text'", id="no object"),
        pytest.param(
            "a.jsonl",
            GOOD + '\n{"body": "a", "id": 1}',
            "a.jsonl:3: no field 'text' (it has ['body', 'id']); set text_field",
            id="no such field",
        ),
        pytest.param(
            "a.jsonl", GOOD + '{"text": null}', "a.jsonl:2: field 'text' is NoneType", id="null"
        ),
        pytest.param("a.jsonl", '{"text": ["a"]}', "a.jsonl:1: field 'text' is list", id="list"),
        pytest.param("a.parquet", b"PAR1", "a.parquet is not a Parquet file", id="no parquet"),
        pytest.param("a.csv", b"a,b", "a.csv: unknown kind of file", id="unknown kind"),
        pytest.param(
            "a.txt", b"only one", "none of its 1 documents falls to val", id="one document"
        ),
    ],
)
def test_bad_files_are_named_in_one_line(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    spec = Spec(files=(str(path),))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        source_texts("mine", spec, split="val", cache=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        pytest.param({"body": ["a"]}, "no column 'text' (it has ['body'])", id="no column"),
        pytest.param({"text": ["a", None]}, "row 2: field 'text' is NoneType", id="null"),
        pytest.param({"text": [1, 2]}, "row 1: field 'text' is int", id="numbers"),
        pytest.param({"text": pyarrow.array([], "string")}, "a.parquet is empty", id="no rows"),
    ],
)
def test_bad_parquet_is_named(columns, message, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=re.escape(message)):
        source_texts("m", Spec(files=(f"{tmp_path}/*",)), split="train", cache=tmp_path / "c")


@pytest.mark.parametrize("pattern", ["nowhere.txt", "*.txt", "no/dir/*.txt"])
def test_missing_files_are_named(pattern, tmp_path):
    spec = Spec(files=(f"{tmp_path}/{pattern}",))
    with pytest.raises(FileNotFoundError, match=re.escape(f"no such file: {tmp_path}/{pattern}")):
        source_texts("mine", spec, split="train", cache=tmp_path)


def test_directories_are_refused_with_a_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"is a directory: name its files, such as '.*/\*\.txt'"):
        source_texts("mine", Spec(files=(str(tmp_path),)), split="train", cache=tmp_path)


def test_names_with_brackets_are_names(tmp_path):
    (tmp_path / "[a].txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    spec = Spec(files=(str(tmp_path / "[a].txt"), str(tmp_path / "b*"), str(tmp_path / "b.txt")))
    found = [*chain(*(source_texts("m", spec, split=s, cache=tmp_path) for s in ("train", "val")))]
    assert sorted(found) == ["one", "two"]


def test_a_context_without_room_is_refused(spec, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="context is 2, expected at least 3"):
        load(spec, tokenizer, tmp_path, context=2)
