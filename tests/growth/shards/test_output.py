import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from apical.growth import checkpoint_output
from apical.growth.operators import Stack, ZeroDepth
from apical.growth.plan import GrowthPlan
from apical.growth.shards import grow_checkpoint


@pytest.mark.parametrize("limit", [1, 10_000, 10**9], ids=["one each", "a few each", "one file"])
def test_shards_in_other_shards_out(saved, tmp_path, limit, split, tensors):
    old = split(saved, 3)
    plan = grow_checkpoint(saved, tmp_path / "big", Stack(), max_shard_bytes=limit)
    written = tensors(tmp_path / "big")
    for name, tensor in written.items():
        assert torch.equal(tensor, old[plan.sources(name).terms[0][0]]), name
    files = sorted(path.name for path in (tmp_path / "big").glob("*.safetensors"))
    if limit == 10**9:
        assert files == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "big" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["weight_map"].keys() == written.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    for file in files:
        held = load_file(tmp_path / "big" / file)
        assert sum(t.nbytes for t in held.values()) <= limit or len(held) == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "big")


def test_companion_files_come_along_and_weights_do_not(saved, tmp_path):
    kept = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"]
    kept += ["generation_config.json", "additional_chat_templates/tool_use.jinja"]
    (saved / "additional_chat_templates").mkdir()
    for name in kept:
        (saved / name).write_text(f'{{"text": "{name} é"}}')
    for name in ["optimizer.pt", "pytorch_model.bin", "trainer_state.json", "README.md"]:
        (saved / name).write_text("old")
    plan = grow_checkpoint(saved, tmp_path / "a" / "big", ZeroDepth())
    out = tmp_path / "a" / "big"
    for name in kept:
        assert (out / name).read_text() == (saved / name).read_text()
    ours = {"README.md", "apical_growth.json", "plan.yaml", "config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == ours | {Path(k).parts[0] for k in kept}
    assert GrowthPlan.from_yaml((out / "plan.yaml").read_text()) == plan
    assert GrowthPlan.from_dict(json.loads((out / "apical_growth.json").read_text())) == plan
    card = (out / "README.md").read_text()
    assert str(plan) in card
    assert "small, grown by zero-depth" in card
    assert str(tmp_path) not in card
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["big"]


def test_new_directories_are_as_readable_as_any(saved, tmp_path):
    grow_checkpoint(saved, tmp_path / "big", Stack())
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "big").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "make",
    [Path.mkdir, lambda out: out.write_text("mine"), lambda out: out.symlink_to("nowhere")],
    ids=["empty directory", "file", "dangling link"],
)
def test_nothing_is_overwritten(saved, tmp_path, make):
    out = tmp_path / "big"
    make(out)
    before = out.lstat()
    with pytest.raises(FileExistsError, match=r"big exists and is not overwritten"):
        grow_checkpoint(saved, out, Stack())
    assert (out.lstat().st_ino, out.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [path.name for path in tmp_path.glob("big*")] == ["big"]


@pytest.mark.parametrize("limit", [0, -1, 1.5, "5GB"], ids=lambda value: repr(value))
def test_shard_sizes_that_are_no_positive_integer_are_refused(saved, tmp_path, limit):
    with pytest.raises(ValueError, match=r"max_shard_bytes is .*expected a positive integer"):
        grow_checkpoint(saved, tmp_path / "big", Stack(), max_shard_bytes=limit)


def test_free_space_is_checked_before_anything_is_written(saved, tmp_path, monkeypatch, tensors):
    needed = sum(t.nbytes for t in tensors(saved).values())  # the grown one needs more
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    with pytest.raises(OSError, match=r"has .* free, the grown checkpoint needs"):
        grow_checkpoint(saved, tmp_path / "big", Stack())
    assert not list(tmp_path.glob("big*"))


def test_a_disk_that_fills_up_leaves_nothing(saved, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a write beyond it fails
    try:
        with pytest.raises(OSError, match=r"^model\.safetensors could not be written: ") as caught:
            grow_checkpoint(saved, tmp_path / "big", Stack())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("big*"))


def test_an_interrupt_leaves_nothing(saved, tmp_path, monkeypatch):
    def interrupt(source, out):
        assert list(out.glob("*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_output, "copy_others", interrupt)
    with pytest.raises(KeyboardInterrupt):
        grow_checkpoint(saved, tmp_path / "big", Stack())
    assert not list(tmp_path.glob("big*"))


def test_progress_is_shown_when_asked_for(saved, tmp_path, capsys):
    grow_checkpoint(saved, tmp_path / "quiet", Stack())
    assert capsys.readouterr() == ("", "")
    grow_checkpoint(saved, tmp_path / "big", Stack(), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "growing: 100%" in err
