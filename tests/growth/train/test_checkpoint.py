"""Checkpoints: read back as written, refused when damaged, never half there."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from apical.growth.train.checkpoint import (
    find_damage,
    list_checkpoints,
    load_tensors,
    newest_checkpoint,
    read_state,
    save_checkpoint,
)

FILES = (".metadata", "__0_0.distcp", "config.json", "manifest.json", "state.json")


def tensors(value: float = 1.0) -> dict[str, Any]:
    """Return tensors of the kinds that a run has: a matrix, a scalar, bytes, an empty one."""
    return {
        "model": {"weight": torch.full((300, 7), value), "none": torch.full((0, 3), value)},
        "optimizer": {"weight": {"step": torch.tensor(value), "exp_avg": torch.full((7,), value)}},
        "rng": {"cpu": torch.full((16,), int(value), dtype=torch.uint8)},
    }


def save(steps: Path, step: int, **state: Any) -> Path:
    return save_checkpoint(
        steps, step=step, tensors=tensors(step), state={"step": step} | state, config='{"a": 1}'
    )


def test_round_trip(tmp_path: Path):
    path = save(tmp_path, 7)
    assert path.name == "step-00000007"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    loaded = tensors(0)
    load_tensors(newest_checkpoint(tmp_path), loaded)
    torch.testing.assert_close(loaded, tensors(7), rtol=0, atol=0)
    assert read_state(path) == {"step": 7}


def test_the_newest_two_are_kept(tmp_path: Path):
    for step in (0, 5, 10, 100):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(0.0, id="first-byte"),
        pytest.param(0.5, id="middle"),
        pytest.param(1.0, id="last-byte"),
    ],
)
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, place: float
):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    content = bytearray((bad / name).read_bytes())
    content[round(place * (len(content) - 1))] ^= 1
    (bad / name).write_bytes(content)
    assert newest_checkpoint(tmp_path) == good
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(bad) in message
    assert name in message
    assert "\n" not in message


def _truncate(path: Path) -> None:
    (path / "__0_0.distcp").write_bytes((path / "__0_0.distcp").read_bytes()[:-100])


def _remove(path: Path) -> None:
    (path / ".metadata").unlink()


def _remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def _add(path: Path) -> None:
    (path / "other").write_text("not mine")


def _empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _forget(path: Path) -> None:
    listed = json.loads((path / "manifest.json").read_text())
    del listed["files"]["state.json"]
    (path / "manifest.json").write_text(json.dumps(listed, indent=1, sort_keys=True))


def _other_json(path: Path) -> None:
    (path / "manifest.json").write_text("[1]")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_truncate, id="a-short-file"),
        pytest.param(_remove, id="a-missing-file"),
        pytest.param(_remove_manifest, id="no-manifest"),
        pytest.param(_add, id="a-file-too-many"),
        pytest.param(_empty, id="nothing-in-it"),
        pytest.param(_forget, id="a-file-the-manifest-does-not-know"),
        pytest.param(_other_json, id="a-manifest-of-another-shape"),
    ],
)
def test_damage_is_found_and_the_one_before_is_used(tmp_path: Path, damage: Any):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage(bad)
    assert find_damage(bad)
    assert find_damage(good) is None
    assert newest_checkpoint(tmp_path) == good
    # it is out of the way, so a run that comes to that step again can write its own
    assert newest_checkpoint(tmp_path) == good
    assert newest_checkpoint(save(tmp_path, 2).parent).name == "step-00000002"


def test_refused_ones_do_not_push_out_good_ones(tmp_path: Path):
    save(tmp_path, 1)
    _truncate(save(tmp_path, 9))
    newest_checkpoint(tmp_path)
    save(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


def test_half_written_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    good = save(tmp_path, 1)
    shutil.copytree(good, tmp_path / "step-00000002.tmp")
    assert newest_checkpoint(tmp_path) == good
    assert "step-00000002.tmp was not finished" in caplog.text
    # and is no hindrance to writing it
    assert newest_checkpoint(save(tmp_path, 2).parent).name == "step-00000002"


def test_none_is_good(tmp_path: Path):
    _truncate(save(tmp_path, 1))
    with pytest.raises(ValueError, match=r"no checkpoint in .* is complete and undamaged"):
        newest_checkpoint(tmp_path)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let writes fail that make a file longer, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("room", "padding"),
    [
        pytest.param(4096, "", id="tensors-do-not-fit"),
        pytest.param(50_000, "x" * 60_000, id="state-does-not-fit"),
    ],
)
def test_full_disk(tmp_path: Path, room: int, padding: str):
    good = save(tmp_path, 1)
    with (
        files_of_at_most(room),
        pytest.raises(OSError, match=r"cannot write the checkpoint .*step-00000002: ") as caught,
    ):
        save(tmp_path, 2, padding=padding)
    assert "\n" not in str(caught.value)
    assert caught.value.errno
    assert list(tmp_path.iterdir()) == [good]
    assert newest_checkpoint(tmp_path) == good


def test_other_shapes_are_refused_in_one_line(tmp_path: Path):
    path = save(tmp_path, 1)
    wrong = {"model": {"weight": torch.zeros(3, 7)}}
    with pytest.raises(ValueError, match=r"cannot load .*step-00000001: ") as caught:
        load_tensors(path, wrong)
    assert "\n" not in str(caught.value)
