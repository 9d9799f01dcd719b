"""Documents from the user's files, each checked before it is believed.

A document is a text file, a line of a .jsonl file or a row of a .parquet file. One text file
alone is cut into sections, so that some of it can be held out.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apical._extras import require

if TYPE_CHECKING:
    from datasets import Dataset

# raise it whenever the same files would give other documents
_FORMAT = 1
_TEXT = (".txt", ".md")
_SUFFIXES = (*_TEXT, ".jsonl", ".parquet")
# characters after which a section ends: at the next empty line, or at any line
_SECTION, _LONG_SECTION = 4_000, 8_000


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that paths and glob patterns name, sorted, each once.

    Raises:
        FileNotFoundError: a pattern matches nothing.
        ValueError: a match is a directory or of an unknown kind.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = _matches(Path(pattern).expanduser())
        if not matches:
            raise FileNotFoundError(f"files: no such file: {pattern}")
        found.update(matches)
    for path in sorted(found):
        if path.is_dir():
            raise ValueError(f"{path} is a directory: name its files, such as '{path}/*.txt'")
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"{path}: unknown kind of file, expected {', '.join(_SUFFIXES)}")
    return sorted(found)


def _matches(pattern: Path) -> list[Path]:
    # a file may have brackets in its name
    if pattern.exists():
        return [pattern]
    # Path.glob takes no absolute pattern
    return [Path(each) for each in glob(str(pattern), recursive=True)]  # noqa: PTH207


def load_documents(paths: Sequence[Path], *, text_field: str, cache: Path) -> "Dataset":
    """Return the documents of files as a memory-mapped dataset with the column `text`.

    Files are read and checked once; later calls find them in the cache by path, size and time.

    Raises:
        ValueError: a file is empty, binary, or lacks `text_field`; file and line are named.
        OSError: a file cannot be read.
    """
    datasets = require("datasets", extra="train", what="reading files")
    try:
        with _no_progress_bars(datasets):
            return datasets.Dataset.from_generator(
                _rows,
                gen_kwargs={"paths": tuple(paths), "text_field": text_field},
                features=datasets.Features({"text": datasets.Value("large_string")}),
                cache_dir=str(cache / "datasets"),
                fingerprint=_stamp(paths, text_field),
            )
    except datasets.exceptions.DatasetGenerationError as error:
        # our own message is the cause
        raise error.__cause__ or error from None


def _rows(paths: tuple[Path, ...], text_field: str) -> Iterator[dict[str, str]]:
    for path in paths:
        empty = True
        for text in _read(path, text_field, alone=len(paths) == 1):
            if text.strip():
                empty = False
                yield {"text": text}
        if empty:
            raise ValueError(f"{path} is empty: it holds no text")


def _read(path: Path, text_field: str, *, alone: bool) -> Iterator[str]:
    if path.suffix == ".parquet":
        return _read_parquet(path, text_field)
    if path.suffix == ".jsonl":
        return _read_jsonl(path, text_field)
    text = _decoded(path.read_bytes(), str(path)).replace("\r\n", "\n")
    return _sections(text) if alone else iter([text])


def _decoded(data: bytes, place: str) -> str:
    zero = data.find(0)
    if zero >= 0:
        raise ValueError(f"{place} is not text: byte {zero} is zero; expected UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not text: byte {error.start} is not UTF-8") from None


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            place = f"{path}:{number}"
            line = _decoded(data, place)
            if line.strip():
                yield _checked(_field(line, place, field), place, field)


def _field(line: str, place: str, field: str) -> Any:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON: {error}") from None
    if not isinstance(row, dict) or field not in row:
        has = f"it has {sorted(row)}" if isinstance(row, dict) else "it is no object"
        raise ValueError(f"{place}: no field {field!r} ({has}); set text_field")
    return row[field]


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    parquet = require("pyarrow.parquet", extra="train", what="reading .parquet files")
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None
    with file:
        names = file.schema_arrow.names
        if field not in names:
            raise ValueError(f"{path}: no column {field!r} (it has {names}); set text_field")
        number = 0
        for batch in file.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _checked(value, f"{path}: row {number}", field)


def _checked(value: Any, place: str, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {field!r} is {type(value).__name__}, expected a string")
    return value


def _sections(text: str) -> Iterator[str]:
    held: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        held.append(line)
        length += len(line)
        if length >= (_LONG_SECTION if line.strip() else _SECTION):
            yield "".join(held)
            held, length = [], 0
    yield "".join(held)


def _stamp(paths: Sequence[Path], text_field: str) -> str:
    states = [(str(path.resolve()), path.stat()) for path in paths]
    files = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    return hashlib.sha256(json.dumps([_FORMAT, text_field, files]).encode()).hexdigest()[:32]


@contextmanager
def _no_progress_bars(datasets: Any) -> Iterator[None]:
    # an environment variable of the user has the last word
    chosen = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None
    if chosen or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
