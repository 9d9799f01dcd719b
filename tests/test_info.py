import json

import torch

from apical import info
from apical.kernels._common import native


def test_everything_is_plain_data():
    collected = info.collect()
    assert json.loads(json.dumps(collected)) == collected


def test_versions_are_the_installed_ones():
    packages = info.collect()["packages"]
    # the installed version of torch may carry a local part, such as +cpu
    assert torch.__version__.startswith(packages["torch"]["version"].split("+")[0])


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setattr(info, "_PACKAGES", {"no-such-package": "train", "neither-this": None})
    collected = info.collect()
    assert collected["packages"]["no-such-package"] == {"version": None, "extra": "train"}
    lines = info.format_info(collected).splitlines()
    assert lines[-2].split(maxsplit=1)[1] == "missing: pip install 'apical[train]'"
    assert lines[-1].split(maxsplit=1)[1] == "missing"


def test_a_missing_library_is_explained(monkeypatch):
    monkeypatch.setattr(native, "status", lambda: (False, "not built; run make build"))
    collected = info.collect()
    assert collected["library"] == {"loaded": False, "why": "not built; run make build"}
    row = collected["ops"]["linear_cross_entropy"]
    assert row["active"] == "PyTorch, in chunks"
    assert row["why"] == "the C++ library is not built; run make build"
    if not torch.cuda.is_available():
        row = collected["ops"]["varlen_attention"]
        assert row["active"] == "PyTorch, one document at a time"
        assert row["why"] == "the C++ library is not built; run make build"


def test_a_loaded_library_is_named():
    loaded, name = native.status()
    row = info.collect()["ops"]["linear_cross_entropy"]
    assert (name in row["active"]) == loaded


def test_instruction_sets_are_those_of_the_processor(monkeypatch):
    monkeypatch.setattr(info, "_cpuinfo", lambda: {"model name": "Some CPU", "flags": "fpu avx2"})
    sets = info.collect()["cpu"]["instruction_sets"]
    assert {name for name, has in sets.items() if has} == {"avx2"}
    assert "avx2, no avx512f" in info.format_info(info.collect())


def test_a_processor_without_that_file_is_no_error(monkeypatch):
    monkeypatch.setattr(info, "_cpuinfo", dict)
    assert info.collect()["cpu"]["model"]


def test_no_cuda_says_why(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert info.collect()["cuda"] == {"devices": [], "why": "this torch is built without CUDA"}
    assert "none: this torch is built without CUDA" in info.format_info(info.collect())


def test_every_op_has_its_line():
    collected = info.collect()
    lines = info.format_info(collected).splitlines()
    for op, row in collected["ops"].items():
        assert [line for line in lines if line.startswith(op) and row["active"] in line]
