"""The C++ and CUDA library: how it is built, loaded, and missed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or os.environ.get("CXX")), reason="no C++ compiler"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def build(folder: Path) -> str:
    where = ("--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp"))
    run = run_python("setup.py", "build_ext", *where)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A library built from scratch in an empty folder."""
    folder = tmp_path_factory.mktemp("built")
    build(folder)
    return folder


def library(folder: Path) -> Path:
    return folder / "lib" / "apical" / "_C.abi3.so"


@needs_compiler
def test_loads_and_runs_in_a_fresh_process(built):
    code = f"""
import torch
torch.ops.load_library({str(library(built))!r})
logits, ids, ones = torch.zeros(1, 4), torch.tensor([[1]]), torch.ones(1)
rest = ids, ones[:, None], None, ones, 0.0, 0.0, 0.0, 1.0, None
loss, nll, lse, *_ = torch.ops.apical.softmax_gradient_(logits, None, *rest)
print(logits.tolist(), round(nll.item(), 4), round(lse.item(), 4))
"""
    run = run_python("-c", code)
    assert run.stdout == "[[0.25, -0.75, 0.25, 0.25]] 1.3863 1.3863\n", run.stderr


@needs_compiler
def test_a_second_build_compiles_nothing(built):
    assert "no work to do" in build(built)


@needs_compiler
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_needs_only_what_every_torch_has(built):
    dynamic = subprocess.run(
        ["readelf", "-d", library(built)], capture_output=True, text=True, check=True
    ).stdout
    # libtorch although no symbol of it is used: on a CUDA torch it brings in the current stream
    assert "[libtorch.so]" in dynamic
    assert "cuda" not in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("torch", "needs torch: pip install torch, then build without isolation"),
        ("g++", "needs g++: install a C++17 compiler or set CXX"),
        ("ninja", "needs ninja: pip install ninja"),
    ],
)
def test_a_missing_tool_is_one_line(absent, message, tmp_path):
    code = f"""
import importlib.util, runpy, shutil, sys
find, which = importlib.util.find_spec, shutil.which
importlib.util.find_spec = lambda name, *a: None if name == {absent!r} else find(name, *a)
shutil.which = lambda name, **o: None if name == {absent!r} else which(name, **o)
where = ["--build-lib", {str(tmp_path)!r}, "--build-temp", {str(tmp_path)!r}]
sys.argv = ["setup.py", "build_ext", *where]
runpy.run_path("setup.py")
"""
    run = run_python("-c", code, CXX="" if absent == "g++" else "c++", APICAL_CUDA="0")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == f"error: building the library {message}"


@pytest.mark.parametrize(
    ("command", "asked", "libraries"),
    [("bdist_wheel", "0", 0), ("bdist_wheel", "1", 1), ("build_ext", "0", 1)],
    ids=["install", "install-and-build", "build"],
)
def test_compiles_only_when_asked(command, asked, libraries):
    code = f"""
import runpy, setuptools, sys
setuptools.setup = lambda **options: print(len(options["ext_modules"]))
sys.argv = ["setup.py", {command!r}]
runpy.run_path("setup.py")
"""
    run = run_python("-c", code, APICAL_BUILD=asked)
    assert run.stdout == f"{libraries}\n", run.stderr


@needs_compiler
@needs_nvcc
# CUDA sources are built where there are any, nvcc is found and nothing forbids it
@pytest.mark.parametrize("allowed", ["1", "0"])
def test_cuda_sources_are_found(allowed, tmp_path):
    for name, text in {
        "cpu/one.cpp": '__attribute__((visibility("default"))) int one() { return 1; }',
        "cuda/two.cu": "__global__ void set() {}\nvoid two() { set<<<1, 1>>>(); }",
    }.items():
        source = tmp_path / "csrc" / name
        source.parent.mkdir(parents=True)
        source.write_text(text)
    code = f"""
import runpy, setuptools, subprocess
from pathlib import Path
setuptools.setup = lambda **options: None
found = runpy.run_path("setup.py")["ninja_file"]
folder = Path({str(tmp_path)!r})
found.__globals__["ROOT"] = folder
(folder / "build.ninja").write_text(found(folder / "library.so"))
subprocess.run(["ninja", "-C", folder], check=True)
subprocess.run(["nm", "-D", "library.so"], cwd=folder, check=True)
"""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = run_python("-c", code, APICAL_CUDA=allowed, PATH=tools)
    assert "3onev\n" in run.stdout, run.stderr
    assert ("3twov\n" in run.stdout) == (allowed == "1")


@pytest.mark.parametrize(
    ("files", "loaded", "why"),
    [
        ([], "False", "not built; run `python setup.py build_ext --inplace` (or `make build`)"),
        (["_C.abi3.so"], "False", "_C.abi3.so does not load: "),
    ],
    ids=["missing", "broken"],
)
def test_an_absent_library_is_explained(tmp_path, files, loaded, why):
    for name in files:
        (tmp_path / name).write_text("not a library")
    code = f"""
import torch
from pathlib import Path
from apical.kernels._common import native
native._PACKAGE = Path({str(tmp_path)!r})
native.status.cache_clear()
print(*native.status())
from apical import linear_cross_entropy
loss = linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1])).loss
print(round(loss.item(), 4))
"""
    run = run_python("-c", code)
    status, loss = run.stdout.splitlines()
    assert status.startswith(f"{loaded} {why}"), run.stderr
    assert loss == "1.3863"
