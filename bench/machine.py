"""Where a number was measured: device, versions, commit, load."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
_ISA = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def facts(device: str, threads: int) -> dict[str, object]:
    """Return what a reader must know to judge or repeat a measurement."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu()[0],
        "device_kind": device,
        "cpu": _cpu()[0],
        "isa": _cpu()[1],
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load_start": load(),
        "versions": {"python": platform.python_version()} | _versions(),
        "extension": _extension(),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        # results of an earlier bench of the same run do not count
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":(exclude)bench/results")),
    }


def load() -> float:
    """Return the load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def slug(facts: dict) -> str:
    """Return the device as part of a file name."""
    name = re.sub(r"\((R|TM)\)", "", str(facts["device"]))
    threads = facts["threads"]
    name += f"-{threads}-threads" if facts["device_kind"] == "cpu" and threads != 1 else ""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu() -> tuple[str, list[str]]:
    """Return the processor's name and those of its instruction sets that matter here."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = flags[1].split() if flags else []
    return name[1] if name else platform.machine(), [isa for isa in _ISA if isa in present]


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "triton", "flash-attn", "liger-kernel", "cut-cross-entropy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _extension() -> str:
    from apical.kernels._common import native

    return native.status()[1]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
