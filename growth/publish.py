"""Directories that are whole or not there: written under another name, made durable, renamed."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STAMP = "unfinished.txt"


@contextmanager
def published(path: Path, *, unfinished: Path, same: str = "") -> Iterator[Path]:
    """Give a directory that becomes `path` if the block ends well, else is removed.

    Everything in it reaches the disk before it gets its name, so that a crash leaves `path`
    complete or not there. What an earlier, killed writer left at `unfinished` is removed, or kept
    if it was to be the same: then the directory is not empty.

    Args:
        path: the name to give; nothing may be there.
        unfinished: the name until then, in the same folder.
        same: what two writers must agree in so that one goes on where the other was killed; empty:
            none does.

    Raises:
        BlockingIOError: another process, not killed, is writing it.
    """
    with _alone(unfinished):
        if not same or _stamp(unfinished) != same:
            _empty(unfinished)
        try:
            if same:
                (unfinished / _STAMP).write_text(same, encoding="utf-8")
            yield unfinished
            (unfinished / _STAMP).unlink(missing_ok=True)
            for part in [*unfinished.rglob("*"), unfinished]:
                sync(part)
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


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Make a directory and hold it against other processes; a kill lets it go."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is writing {directory}; wait for it") from None
        except OSError as error:
            # some file systems have no locks
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                raise
        yield
    finally:
        os.close(descriptor)


def _stamp(directory: Path) -> str:
    path = directory / _STAMP
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _empty(directory: Path) -> None:
    for part in directory.iterdir():
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        else:
            part.unlink()


def _size(count: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"


def _rename(unfinished: Path, path: Path) -> None:
    unfinished.rename(path)
    sync(path.parent)
