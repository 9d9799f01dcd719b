import os
import subprocess
import sys

import huggingface_hub
import pytest
import torch

from apical import cli
from apical.growth import source as sources
from apical.growth.operators import Stack
from apical.growth.shards import grow_checkpoint


def test_a_name_of_the_hub_is_fetched(saved, tmp_path, monkeypatch, tensors):
    asked = []

    def download(name, **options):
        asked.append((name, options["allow_patterns"]))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    grow_checkpoint("someone/small-model", tmp_path / "big", Stack())
    ((name, patterns),) = asked
    assert name == "someone/small-model"
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith(".bin") for pattern in patterns)
    assert len(tensors(tmp_path / "big")) > len(tensors(saved))
    assert "# someone/small-model, grown by stack" in (tmp_path / "big" / "README.md").read_text()


def test_offline_a_name_is_one_clear_error(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "apical", "grow", "someone/small-model", "big", "stack"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "someone/small-model is no directory here and could not be fetched" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("big*"))


def test_two_gguf_files_are_one_too_many(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="has 2 GGUF files; expected one"):
        grow_checkpoint(tmp_path, tmp_path / "big", Stack())


def test_gguf_needs_its_package(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the package gguf: pip install gguf"):
        grow_checkpoint(tmp_path / "a.gguf", tmp_path / "big", Stack())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "operator and --plan are missing"),
        (["stack", "--plan", "p.yaml"], "operator and --plan are both given"),
        (["--plan", "p.yaml"], "p.yaml is no file"),
    ],
)
def test_an_operator_or_a_plan(saved, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["grow", str(saved), "big", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_on_the_command_line(saved, tmp_path, capsys, tensors):
    big, again = tmp_path / "big", tmp_path / "again"
    assert cli.main(["grow", str(saved), str(big), "stack", "--factor", "3"]) == 0
    assert cli.main(["grow", str(saved), str(again), "--plan", str(big / "plan.yaml")]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {again}\n")
    expected, written = tensors(big), tensors(again)
    assert all(torch.equal(tensor, written[name]) for name, tensor in expected.items())
