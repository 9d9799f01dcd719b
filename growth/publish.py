"""Directories that are whole or not there: written under another name, made durable, renamed."""

import errno
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


def require_space(directory: Path, needed: int, *, what: str) -> None:
    """Check that a disk has room, before anything is written to it.

    Args:
        directory: a folder on the disk.
        needed: in bytes.
        what: is to be written.

    Raises:
        OSError: it has not; both sizes are named.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        message = f"{directory} has {_size(free)} free, {what} needs {_size(needed)}"
        raise OSError(errno.ENOSPC, f"{message}: free some, or choose another disk")


def _size(count: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"


def _rename(unfinished: Path, path: Path) -> None:
    unfinished.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
