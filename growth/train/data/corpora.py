"""Two corpora of real text without a download, from the Python packages that are installed.

"prose" is English: docstrings of the standard library and of widely installed packages.
"code" is the standard library without comments and docstrings. Texts are built where they
are used and never shipped; the same versions give the same bytes.
"""

import hashlib
import json
import logging
import os
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .cache import cached
from .extract import definitions, joined, paragraphs, words

_log = logging.getLogger(__name__)

# raise it whenever the same packages would give other bytes
_FORMAT = 1
# characters of a document; a longer one is a table in the clothes of a statement
_SHORTEST, _LONGEST = 200, 100_000
_VALIDATION = 20

_LICENCES = {
    "python": "PSF-2.0",
    "datasets": "Apache-2.0",
    "huggingface_hub": "Apache-2.0",
    "matplotlib": "Matplotlib licence (PSF-based)",
    "networkx": "BSD-3-Clause",
    "numpy": "BSD-3-Clause",
    "pandas": "BSD-3-Clause",
    "pydantic": "MIT",
    "scipy": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "torch": "BSD-3-Clause",
    "transformers": "Apache-2.0",
}
CORPORA = {"prose": tuple(_LICENCES), "code": ("python",)}

# tests, tables and files that differ between builds of one version
_LEFT_OUT = {
    *("site-packages", "dist-packages", "_vendor", "_bundled", "__pycache__", "__phello__"),
    *("test", "tests", "testing", "idle_test", "turtledemo", "lib2to3", "encodings"),
}
_UNREADABLE = (OSError, SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError)


def build_corpus(name: str, *, cache: Path, max_bytes: int | None = None) -> Path:
    """Return a directory with `train.jsonl`, `val.jsonl` and `manifest.json`, built if missing.

    Lines are `{"text": …}`. About one file in twenty goes to validation, by the hash of its
    name; no paragraph is in both. Files are taken in the order of that hash until there are
    enough, so a small corpus is fast to build and a sample of the large one.

    Args:
        name: "prose" or "code".
        cache: root of the cache, usually `cache_dir()`.
        max_bytes: most UTF-8 bytes of text in both splits together; None for all there is.

    Raises:
        ValueError: no such corpus, or `max_bytes` leaves a split empty.
    """
    if name not in CORPORA:
        raise ValueError(f"corpus is {name!r}, expected one of {sorted(CORPORA)}")
    if max_bytes is not None and max_bytes < _VALIDATION * _SHORTEST:
        least = _VALIDATION * _SHORTEST
        raise ValueError(f"max_bytes is {max_bytes}, expected at least {least}, or null for all")
    roots = _installed(CORPORA[name])
    identity = _identity(name, roots, max_bytes)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / "corpora" / f"{name}-{key}"
    return cached(path, lambda each: _build(each, identity, roots), is_intact=_is_intact)


def read_corpus(directory: Path, split: str) -> Iterator[str]:
    """Yield the texts of one split, "train" or "val", of a built corpus."""
    with (directory / f"{split}.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _installed(packages: tuple[str, ...]) -> dict[str, tuple[str, Path]]:
    """Return version and directory of those packages that are there, importing none."""
    found = {"python": (platform.python_version(), Path(sysconfig.get_path("stdlib")))}
    for package in packages:
        spec = None if package == "python" else find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        try:
            found[package] = (version(package), Path(spec.submodule_search_locations[0]))
        except PackageNotFoundError:
            _log.debug("%s has no version and is left out", package)
    return found


def _identity(
    name: str, roots: dict[str, tuple[str, Path]], max_bytes: int | None
) -> dict[str, Any]:
    packages = {
        package: {"version": number, "licence": _LICENCES[package]}
        for package, (number, _) in roots.items()
    }
    return {"format": _FORMAT, "name": name, "max_bytes": max_bytes, "packages": packages}


def _build(directory: Path, identity: dict[str, Any], roots: dict[str, tuple[str, Path]]) -> None:
    name, max_bytes = identity["name"], identity["max_bytes"]
    _log.info("building the corpus %s from %s", name, ", ".join(roots))
    splits = _split_files(roots)
    seen: set[bytes] = set()
    files = {}
    # validation first: what it holds is then left out of training
    for split in ("val", "train"):
        texts = _limited(_documents(name, splits[split], seen), _budget(split, max_bytes))
        files[f"{split}.jsonl"] = _write(directory / f"{split}.jsonl", texts)
        if files[f"{split}.jsonl"]["documents"] == 0:
            raise ValueError(
                f"corpus {name!r}: max_bytes={max_bytes} leaves {split} empty; raise it"
            )
    manifest = json.dumps({**identity, "files": files}, indent=2)
    (directory / "manifest.json").write_text(manifest + "\n", encoding="utf-8")


def _split_files(roots: dict[str, tuple[str, Path]]) -> dict[str, list[Path]]:
    ordered: list[tuple[bytes, Path]] = []
    for package, (_, root) in roots.items():
        for path in _python_files(root):
            name = f"{package}/{path.relative_to(root).as_posix()}"
            ordered.append((hashlib.sha256(name.encode()).digest(), path))
    splits: dict[str, list[Path]] = {"train": [], "val": []}
    for digest, path in sorted(ordered):
        # the last byte splits and the first ones order, so the two are independent
        splits["val" if digest[-1] % _VALIDATION == 0 else "train"].append(path)
    return splits


def _python_files(root: Path) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [each for each in subdirectories if each not in _LEFT_OUT]
        for name in names:
            # _sysconfigdata holds the paths of the machine that built this python
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(directory, name)


def _documents(name: str, files: list[Path], seen: set[bytes]) -> Iterator[str]:
    for path in files:
        try:
            parts = _parts(name, path)
        except _UNREADABLE as error:
            _log.debug("left out %s: %s", path, error)
            continue
        fresh = [part for part in parts if _is_new(part, seen)]
        for text in joined(fresh) if name == "prose" else fresh:
            if _SHORTEST <= len(text) <= _LONGEST:
                yield text


def _parts(name: str, path: Path) -> list[str]:
    with warnings.catch_warnings():
        # other people's invalid escapes are no concern of our user
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        with tokenize.open(path) as file:
            source = file.read()
        return paragraphs(source) if name == "prose" else definitions(source)


def _is_new(text: str, seen: set[bytes]) -> bool:
    # by words, since copies often differ in a number or in punctuation
    digest = hashlib.sha256(" ".join(words(text)).encode()).digest()[:16]
    new = digest not in seen
    seen.add(digest)
    return new


def _budget(split: str, max_bytes: int | None) -> int | None:
    if max_bytes is None:
        return None
    validation = max_bytes // _VALIDATION
    return validation if split == "val" else max_bytes - validation


def _limited(texts: Iterator[str], budget: int | None) -> Iterator[str]:
    """Yield the texts that fit, until nine tenths of the budget are used."""
    used = 0
    for text in texts:
        size = len(text.encode())
        if budget is None or used + size <= budget:
            used += size
            yield text
        elif used > 0.9 * budget:
            return


def _write(path: Path, texts: Iterator[str]) -> dict[str, Any]:
    documents = n_bytes = 0
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for text in texts:
            line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            digest.update(line)
            documents += 1
            n_bytes += len(text.encode())
    return {"sha256": digest.hexdigest(), "documents": documents, "bytes": n_bytes}


def _is_intact(directory: Path) -> bool:
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        return all(
            hashlib.sha256((directory / name).read_bytes()).hexdigest() == entry["sha256"]
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False
