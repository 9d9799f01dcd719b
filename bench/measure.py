"""Time, memory and ceilings of the device that the benches run on."""

import ctypes
import gc
import time
from pathlib import Path

import torch
from race import Call, Meter, Outputs

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def meter_for(device: str) -> Meter:
    """Return the meter of "cpu" or "cuda"."""
    return CudaMeter() if device == "cuda" else CpuMeter()


class CpuMeter:
    """Wall time, and the growth of the resident set."""

    def seconds(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def weigh(self, call: Call) -> tuple[Outputs, float, int | None]:
        before = _reset_peak()
        start = time.perf_counter()
        outputs = call()
        seconds = time.perf_counter() - start
        return outputs, seconds, None if before is None else _peak() - before


class CudaMeter:
    """Time between events on the current stream with a cold L2, and torch's allocator."""

    def __init__(self) -> None:
        # larger than any L2 so far (Blackwell: 126 MB)
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def seconds(self, call: Call) -> float:
        return self._timed(call)[1]

    def weigh(self, call: Call) -> tuple[Outputs, float, int | None]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs, seconds = self._timed(call)
        return outputs, seconds, torch.cuda.max_memory_allocated() - before

    def _timed(self, call: Call) -> tuple[Outputs, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        outputs = call()
        end.record()
        torch.cuda.synchronize()
        return outputs, start.elapsed_time(end) / 1e3


def _reset_peak() -> int | None:
    """Forget the peak of the resident set and return what is resident, where Linux lets us."""
    gc.collect()
    try:
        # freed blocks that malloc keeps would hide the growth
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR_REFS.write_text("5")
    except (OSError, AttributeError):
        return None
    return _peak()


def _peak() -> int:
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def peaks(device: str, *, quick: bool = False) -> dict[str, float]:
    """Return the rates that shares refer to: TFLOP/s of square GEMMs per dtype, GB/s of a copy."""
    cuda = device == "cuda"
    size = 512 if quick else 8192 if cuda else 2048
    count = 4 << 20 if quick else 128 << 20
    meter = meter_for(device)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / _best(meter, torch.mm, a, b) / 1e12
    source, target = (torch.ones(count, device=device) for _ in range(2))
    found["copy_gb"] = 2 * source.nbytes / _best(meter, target.copy_, source) / 1e9
    return found


def _best(meter: Meter, function, *tensors: torch.Tensor) -> float:
    # the fastest, not the median: a ceiling
    return min(meter.seconds(lambda: (function(*tensors),)) for _ in range(6))
