"""The wheel: whole through the links, pure unless asked, and good outside of the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("kernels", "growth", "csrc", "src", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel built from a copy, so that the build leaves nothing in the repository."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    environment = {k: v for k, v in os.environ.items() if k != "APICAL_BUILD"}
    subprocess.run([*command, "-w", str(out), str(copy)], check=True, env=environment)
    (path,) = out.glob("*.whl")
    return path


def test_it_holds_every_module(wheel: Path):
    held = set(zipfile.ZipFile(wheel).namelist())
    assert "apical/py.typed" in held
    places = {ROOT: ("kernels", "growth"), ROOT / "src" / "apical": ("hf", "packing")}
    for top, folder in ((top, folder) for top, folders in places.items() for folder in folders):
        modules = {f"apical/{p.relative_to(top)}" for p in (top / folder).rglob("*.py")}
        assert modules
        assert modules <= held
    assert not any(name.startswith(("tests", "bench", "kernels", "growth")) for name in held)


def test_installing_compiles_nothing(wheel: Path):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())


def test_it_works_outside_of_the_repository(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
import apical, torch
q = torch.randn(5, 2, 8)
out = apical.varlen_attention(q, q, q, torch.tensor([0, 2, 5]), causal=True)
loss = apical.linear_cross_entropy(q[:, 0], torch.randn(7, 8), torch.arange(5)).loss
print(apical.__file__, out.isfinite().all().item(), loss.isfinite().item())
print(apical.Stack(2).plan({"model_type": "llama", "num_hidden_layers": 1}).layers)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.startswith(f"{tmp_path}/site/apical/__init__.py True True"), run.stderr
