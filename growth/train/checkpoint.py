"""Checkpoints to resume from: complete, verified and durable, or not there at all."""

import errno
import hashlib
import json
import logging
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..publish import published, require_space

logger = logging.getLogger(__name__)

KEEP = 2
_NAME = re.compile(r"step-\d{8}")
_MANIFEST = "manifest.json"

Tensors = dict[str, Any]  # nested by name, tensors at the leaves


def checkpoint_path(steps: Path, step: int) -> Path:
    return steps / f"step-{step:08d}"


def save_checkpoint(
    steps: Path, *, step: int, tensors: Tensors, state: dict[str, Any], config: str
) -> Path:
    """Write a checkpoint under a temporary name, make it durable, then give it its name.

    Args:
        steps: the folder of a run's checkpoints; the newest two are kept.
        tensors: what dcp shards and reads back in place.
        state: everything else, as JSON.
        config: the model's config.json.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    path = checkpoint_path(steps, step)
    try:
        steps.mkdir(parents=True, exist_ok=True)
        require_space(steps, _bytes_of(tensors), what="the checkpoint")
        with published(path, unfinished=path.with_suffix(".tmp")) as unfinished:
            _write_tensors(unfinished, tensors)
            (unfinished / "state.json").write_text(json.dumps(state), encoding="utf-8")
            (unfinished / "config.json").write_text(config, encoding="utf-8")
            (unfinished / _MANIFEST).write_text(_manifest(unfinished), encoding="utf-8")
    except OSError as error:
        reason = f"cannot write the checkpoint {path}: {error.strerror}; earlier ones are untouched"
        raise OSError(error.errno, reason) from error
    for old in list_checkpoints(steps)[:-KEEP]:
        shutil.rmtree(old)
    return path


def list_checkpoints(steps: Path) -> list[Path]:
    """Return the checkpoints that bear a final name, oldest first, verified or not."""
    return sorted(path for path in steps.glob("step-*") if _NAME.fullmatch(path.name))


def newest_checkpoint(steps: Path) -> Path:
    """Return the newest checkpoint that verifies, setting aside each that does not, by name.

    Raises:
        ValueError: none of them verifies.
    """
    for unfinished in steps.glob("step-*.tmp"):
        logger.warning("%s was not finished and is not used", unfinished)
    for path in reversed(list_checkpoints(steps)):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning("checkpoint %s is refused: %s; trying the one before", path, damage)
        # out of the way, so that it never counts as one of those kept
        aside = path.with_suffix(".refused")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    raise ValueError(f"no checkpoint in {steps} is complete and undamaged; start a new run")


def find_damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, None when its manifest holds for all."""
    try:
        written, actual = (path / _MANIFEST).read_text(encoding="utf-8"), _manifest(path)
        if written == actual:
            return None
        expected, found = json.loads(written)["files"], json.loads(actual)["files"]
        names = [n for n in sorted({*expected, *found}) if expected.get(n) != found.get(n)]
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} is damaged"
    return f"{names[0] if names else 'its form'} does not agree with {_MANIFEST}"


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def load_tensors(path: Path, tensors: Tensors) -> None:
    """Read a checkpoint's tensors into the given ones, in place.

    Raises:
        ValueError: names or shapes differ from those saved.
    """
    try:
        with warnings.catch_warnings():
            _ignore_single_process()
            load(tensors, checkpoint_id=path, no_dist=True)
    except CheckpointException as error:
        raise ValueError(f"cannot load {path}: {_line(_cause(error))}") from error


def _write_tensors(path: Path, tensors: Tensors) -> None:
    try:
        with warnings.catch_warnings():
            _ignore_single_process()
            save(tensors, checkpoint_id=path, no_dist=True)
    # not an Exception: it has to be named to be caught
    except CheckpointException as error:
        cause = _cause(error)
        raise OSError(getattr(cause, "errno", None) or errno.EIO, _line(cause)) from error


def _bytes_of(tensors: Tensors) -> int:
    values = (
        _bytes_of(v) if isinstance(v, dict) else getattr(v, "nbytes", 0) for v in tensors.values()
    )
    return sum(values)


def _cause(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _ignore_single_process() -> None:
    # dcp warns that it works in one process even when told to
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


def _manifest(path: Path) -> str:
    files = {
        str(file.relative_to(path)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != _MANIFEST
    }
    return json.dumps({"files": files}, indent=1, sort_keys=True)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
