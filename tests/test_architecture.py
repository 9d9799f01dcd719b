"""The walls of the house: import direction, top-level folders, file sizes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "apical"

# what a plan is, and what is made of it without any weight
_PLANS = {
    "apical.growth.spaces",
    "apical.growth.maps",
    "apical.growth.widths",
    "apical.growth.plan",
    "apical.growth.plan_algebra",
    "apical.growth.plan_text",
}
# room -> rooms it may import; a room is the longest matching prefix of a module's name
ALLOWED = {
    "apical.kernels": {"apical.kernels"},
    "apical._extras": set(),
    "apical.packing": {"apical.packing"},
    "apical.hf": {"apical.hf", "apical.kernels", "apical.packing", "apical._extras"},
    "apical.info": {"apical.kernels", "apical.hf", "apical._extras"},
    "apical.growth.spaces": {"apical.growth.spaces", "apical._extras"},
    "apical.growth.maps": set(),
    "apical.growth.widths": {"apical.growth.maps", "apical.growth.spaces"},
    "apical.growth.plan": _PLANS | {"apical._extras"},
    "apical.growth.plan_algebra": _PLANS,
    "apical.growth.plan_text": _PLANS,
    "apical.growth": _PLANS
    | {
        "apical.growth",
        "apical._extras",
    },
    "apical.growth.operators": _PLANS | {"apical.growth.operators"},
    "apical.growth.interpolate": _PLANS | {"apical.growth", "apical.growth.operators"},
    "apical.growth.sparse": {
        "apical.growth.sparse",
        "apical.growth",
        "apical.kernels",
        "apical._extras",
    },
    "apical.growth.continual": {"apical.growth.continual", "apical._extras"},
    "apical.growth.objectives": {"apical.growth.objectives", "apical.kernels"},
    "apical.growth.train": {
        "apical.growth.train",
        "apical.growth.objectives",
        "apical.growth.continual",
        "apical.growth.operators",
        "apical.growth.sparse",
        "apical.growth",
        "apical.growth.plan",
        "apical.growth.spaces",
        "apical.hf",
        "apical.packing",
        "apical._extras",
        "apical",
    },
}
# these may import whatever they show to users
FACES = {"apical", "apical.cli", "apical.commands", "apical.rule_commands", "apical.__main__"}
TORCH_ONLY = set(sys.stdlib_module_names) | {"torch", "triton", "apical"}


def modules() -> list[tuple[str, Path]]:
    """Return every module of the package, by its name in the package (through the links)."""
    found = []
    for folder in (PACKAGE, PACKAGE / "kernels", PACKAGE / "growth"):
        pattern = "*.py" if folder == PACKAGE else "**/*.py"
        found += [
            (".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts), path)
            for path in folder.glob(pattern)
        ]
    found += [
        (".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts), path)
        for room in ("hf", "packing")
        for path in PACKAGE.glob(f"{room}/*.py")
    ]
    return sorted((name.removesuffix(".__init__"), path) for name, path in found)


def imports(name: str, path: Path) -> set[str]:
    """Return the absolute names of all modules that a file imports, also inside functions."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1])
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {f"{base}.{part}" for part in names}
    return found


def room(name: str) -> str:
    prefixes = [key for key in ALLOWED if name == key or name.startswith(key + ".")]
    return max(prefixes, key=len, default="apical" if name.startswith("apical") else name)


def test_the_package_was_found():
    names = {name for name, _ in modules()}
    assert {"apical.kernels.varlen_attention.api", "apical.growth.plan", "apical.cli"} <= names


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_one_way(name: str, path: Path):
    if name in FACES:
        return
    inside = {target for target in imports(name, path) if target.split(".")[0] == "apical"}
    wrong = {target for target in inside if room(target) not in ALLOWED[room(name)]}
    assert not wrong, f"{name} ({room(name)}) must not import {sorted(wrong)}"


def test_kernels_and_packing_need_torch_alone():
    for name, path in modules():
        if name.startswith(("apical.kernels", "apical.packing")):
            outside = {target.split(".")[0] for target in imports(name, path)} - TORCH_ONLY
            # a kernel that is chosen by name, where it is installed
            outside -= {"flash_attn"} if name.endswith("._peers") else set()
            assert not outside, f"{name} imports {sorted(outside)}"


def test_import_apical_loads_torch_alone():
    heavy = ("transformers", "datasets", "tokenizers", "safetensors", "pydantic", "yaml", "tyro")
    code = (
        "import sys, apical; apical.varlen_attention, apical.linear_cross_entropy; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_transformers_imports_from_the_repository_root():
    code = "import transformers; from transformers import LlamaForCausalLM; print('ok')"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert out.stdout.strip() == "ok", out.stderr


def test_no_package_shadows_another():
    # the import name `kernels` belongs to Hugging Face: a regular package here would hide it
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "growth" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    for link in ("kernels", "growth"):
        assert (PACKAGE / link).is_symlink()
        assert (PACKAGE / link).resolve() == ROOT / link


def test_files_stay_small():
    folders = ("kernels", "growth", "src", "csrc", "bench")
    files = [
        p
        for f in folders
        for p in (ROOT / f).rglob("*")
        if p.suffix in {".py", ".cpp", ".cu", ".h"}
    ]
    assert files
    long = {
        str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long, f"split these files: {long}"
