"""What runs here and why: devices, versions, and the active implementation of each op."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .kernels._common import native

# package, and the extra that brings it
_PACKAGES = {
    "torch": None,
    "tyro": None,
    "triton": "dev",
    "transformers": "hf",
    "safetensors": "hf",
    "tokenizers": "train",
    "datasets": "train",
    "pydantic": "train",
    "matplotlib": "train",
    "pytest-benchmark": "bench",
    "ninja": "dev",
}
# instruction sets that decide how fast the ops are, by their names in /proc/cpuinfo
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def collect() -> dict[str, Any]:
    """Return devices, versions and active implementations as plain data, ready for JSON."""
    loaded, why = native.status()
    return {
        "apical": version("apical"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cuda": _cuda(),
        "library": {"loaded": loaded, "why": why},
        "ops": _ops(),
        "packages": {name: _package(name, extra) for name, extra in _PACKAGES.items()},
    }


def format_info(info: dict[str, Any]) -> str:
    """Return what `collect` found as aligned lines of text."""
    cpu, cuda, library = info["cpu"], info["cuda"], info["library"]
    sets = [f"{'' if has else 'no '}{name}" for name, has in cpu["instruction_sets"].items()]
    lines = [
        ("apical", f"{info['apical']}, Python {info['python']}, {info['platform']}"),
        ("cpu", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} torch threads"),
        ("", ", ".join(sets)),
        *(("cuda", device) for device in cuda["devices"] or [f"none: {cuda['why']}"]),
        ("C++ library", f"{'loaded' if library['loaded'] else 'not loaded'}: {library['why']}"),
        ("", ""),
        *((op, f"{row['active']}: {row['why']}") for op, row in info["ops"].items()),
        ("", ""),
        *((name, _package_line(row)) for name, row in info["packages"].items()),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in lines)


def _cpu() -> dict[str, Any]:
    fields = _cpuinfo()
    flags = fields.get("flags", "").split()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instruction_sets": {name: name in flags for name in _INSTRUCTION_SETS},
    }


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's fields; there are none outside Linux."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cuda() -> dict[str, Any]:
    if torch.version.cuda is None:
        return {"devices": [], "why": "this torch is built without CUDA"}
    if not torch.cuda.is_available():
        return {"devices": [], "why": f"torch is built for CUDA {torch.version.cuda}, no device"}
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"devices": names, "why": f"CUDA {torch.version.cuda}"}


def _ops() -> dict[str, dict[str, str]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "varlen_attention": {"device": device, **_attention(device)},
        "linear_cross_entropy": {"device": device, **_cross_entropy(device)},
    }


def _attention(device: str) -> dict[str, str]:
    loop = "PyTorch, one document at a time"
    if device != "cpu":
        return _on_a_gpu(loop, "float64 stays in PyTorch")
    return _on_the_cpu(loop, "C++", "float64 stays in PyTorch")


def _cross_entropy(device: str) -> dict[str, str]:
    loop = "PyTorch, in chunks"
    if device != "cpu":
        return _on_a_gpu(loop, "float32 stays in PyTorch, in chunks")
    return _on_the_cpu(loop, f"{loop}, softmax pass", "the library is loaded")


def _on_the_cpu(without: str, active: str, why: str) -> dict[str, str]:
    loaded, name = native.status()
    if not loaded:
        return {"active": without, "why": f"the C++ library is {name}"}
    units = ", bfloat16 on AMX" if torch.ops.apical.amx_supported() else ""
    return {"active": f"{active} in {name}, {torch.ops.apical.cpu_isa()}{units}", "why": why}


def _on_a_gpu(without: str, why: str) -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability()
    if find_spec("triton") is None:
        return {"active": without, "why": "triton is not installed"}
    if (major, minor) < (8, 0):
        return {"active": without, "why": f"compute capability {major}.{minor} is below 8.0"}
    return {"active": f"Triton {version('triton')}", "why": why}


def _package(name: str, extra: str | None) -> dict[str, str | None]:
    try:
        return {"version": version(name), "extra": extra}
    except PackageNotFoundError:
        return {"version": None, "extra": extra}


def _package_line(row: dict[str, str | None]) -> str:
    if row["version"] is not None:
        return row["version"]
    return "missing" if row["extra"] is None else f"missing: pip install 'apical[{row['extra']}]'"
