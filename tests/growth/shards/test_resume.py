import hashlib
import json
import subprocess
import sys
import textwrap

import pytest
import torch

from apical.growth import checkpoint_output
from apical.growth.operators import Stack
from apical.growth.shards import grow_checkpoint

# a file each for a few tensors
_BYTES = 10_000
# kills itself with -9 when two files are whole and the third one has its header
_CODE = """
    import os, signal, sys
    from apical.growth import checkpoint_output, shards
    from apical.growth.operators import Stack
    write = checkpoint_output.write_tensors
    def write_and_die(path, forms, tensor, *, wrote):
        def tensor_or_death(name):
            if path.name.startswith("model-00003"):
                os.kill(os.getpid(), signal.SIGKILL)
            return tensor(name)
        write(path, forms, tensor_or_death, wrote=wrote)
    checkpoint_output.write_tensors = write_and_die
    shards.grow_checkpoint(sys.argv[1], sys.argv[2], Stack(), max_shard_bytes=int(sys.argv[3]))
"""


@pytest.fixture
def killed(saved, tmp_path):
    """Return what a killed run left, and the two files that it had finished, with their inodes."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(_CODE), str(saved)]
    command += [str(tmp_path / "big"), str(_BYTES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -9, done.stderr
    (left,) = tmp_path.glob("big*")
    assert left.name == "big.unfinished"
    files = sorted(left.glob("*.safetensors"))
    assert [file.name[:11] for file in files] == ["model-00001", "model-00002"]
    assert [file.name[:11] for file in left.glob("*.partial")] == ["model-00003"]
    return left, {file.name: file.stat().st_ino for file in files}


def _inodes(directory, names):
    return {n: (directory / n).stat().st_ino for n in names if (directory / n).exists()}


def test_a_run_goes_on_where_another_was_killed(saved, tmp_path, tensors, killed):
    left, files = killed
    grow_checkpoint(saved, tmp_path / "big", Stack(), max_shard_bytes=_BYTES)
    assert _inodes(tmp_path / "big", files) == files
    assert not left.exists()
    grow_checkpoint(saved, tmp_path / "at once", Stack(), max_shard_bytes=_BYTES)
    names = {path.name for path in (tmp_path / "at once").iterdir()}
    assert {path.name for path in (tmp_path / "big").iterdir()} == names
    expected, written = tensors(tmp_path / "at once"), tensors(tmp_path / "big")
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in expected.items())


def _other_config(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))


def _other_weights(source):
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "operator", "size"),
    [
        (None, Stack(3), _BYTES),
        (None, Stack(), 2 * _BYTES),
        (_other_config, Stack(), _BYTES),
        (_other_weights, Stack(), _BYTES),
    ],
    ids=["plan", "size of files", "config", "weights"],
)
def test_what_differs_starts_over(saved, tmp_path, tensors, killed, change, operator, size):
    del killed
    if change:
        change(saved)
    written = []
    # an inode may be given again, so what is written is noted
    write = checkpoint_output.write_tensors

    def noted(path, *rest, **options):
        written.append(path.name)
        write(path, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_output, "write_tensors", noted)
        plan = grow_checkpoint(saved, tmp_path / "big", operator, max_shard_bytes=size)
    there = sorted(path.name for path in (tmp_path / "big").glob("*.safetensors"))
    assert written == there
    assert [path.name for path in tmp_path.glob("big*")] == ["big"]
    old = tensors(saved)
    for name, tensor in tensors(tmp_path / "big").items():
        assert torch.equal(tensor, old[plan.sources(name).terms[0][0]]), name


def test_two_do_not_write_one_directory(saved, tmp_path):
    code = """
        import fcntl, os, sys, time
        fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
        print("held", flush=True)
        time.sleep(100)
    """
    (tmp_path / "big.unfinished").mkdir()
    (tmp_path / "big.unfinished" / "theirs").write_text("")
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "big.unfinished")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OSError, match="another process is writing"):
            grow_checkpoint(saved, tmp_path / "big", Stack())
        other.kill()
    assert (tmp_path / "big.unfinished" / "theirs").exists()


def test_the_same_growth_writes_the_same_bytes(saved, tmp_path):
    digests = set()
    for name in ("one", "two"):
        grow_checkpoint(saved, tmp_path / name, Stack())
        digests.add(
            hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest()
        )
    assert len(digests) == 1
