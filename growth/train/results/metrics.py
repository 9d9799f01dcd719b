"""The record of a run: one JSON object a line, cut back to a known length on resume."""

import json
import os
from pathlib import Path
from typing import Any

# what differs between two runs of the same recipe; all the rest is equal on a CPU, bit for bit
TIMING_KEYS = frozenset({"seconds", "tokens_per_second"})


class Metrics:
    """An append-only file of records whose length on disk is known."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        # a reader may follow the file while the run goes on
        self._file.flush()

    def sync(self) -> int:
        """Put every record on disk and return the length of the file, in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def truncate_metrics(path: Path, length: int) -> None:
    """Cut a record back to what a checkpoint has seen.

    Raises:
        ValueError: the file is missing or shorter than the checkpoint says.
    """
    size = path.stat().st_size if path.exists() else 0
    if size < length:
        raise ValueError(
            f"{path} has {size} bytes but the checkpoint was made at {length}: "
            "it was changed or deleted since; start a new run"
        )
    if path.exists():
        os.truncate(path, length)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a run, oldest first."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
