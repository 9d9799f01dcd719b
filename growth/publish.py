"""Directories that are whole or not there: written under another name, made durable, renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def published(path: Path, *, unfinished: Path) -> Iterator[Path]:
    """Give an empty directory that becomes `path` if the block ends well, else is removed.

    Everything in it reaches the disk before it gets its name, so that a crash leaves `path`
    complete or not there. What an earlier, killed writer left at `unfinished` is removed.

    Args:
        path: the name to give; nothing may be there.
        unfinished: the name until then, in the same folder.
    """
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for part in [*unfinished.rglob("*"), unfinished]:
            _sync(part)
        _rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _rename(unfinished: Path, path: Path) -> None:
    unfinished.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
