"""Where built corpora, tokenizers and token arrays are kept, and how they get there."""

import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Return the cache's root: $APICAL_CACHE, or ~/.cache/apical."""
    return Path(os.environ.get("APICAL_CACHE") or "~/.cache/apical").expanduser()


def cached(
    path: Path,
    build: Callable[[Path], None],
    *,
    is_intact: Callable[[Path], bool] = Path.is_dir,
) -> Path:
    """Return the directory `path`, built first where it is missing or damaged.

    It is built beside its place and renamed, so that no reader ever sees half of it; of two
    processes that build it at once, the first one's result stays.

    Args:
        path: the directory; its name must identify its content.
        build: fills an empty directory.
        is_intact: whether a directory that is there can be used.
    """
    if path.is_dir():
        if is_intact(path):
            return path
        _log.warning("%s is damaged and is built again", path)
        shutil.rmtree(path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        build(unfinished)
        _move(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def _move(unfinished: Path, path: Path) -> None:
    try:
        unfinished.rename(path)
    except OSError:
        # another process was first; anything else (a full disk, say) is the caller's to hear of
        if not path.is_dir():
            raise
