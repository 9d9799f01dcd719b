"""Launching the Triton kernels: configurations, the probe that picks one, and scratch memory."""

import contextvars
import functools
import logging
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.errors import TritonError

_LOGGER = logging.getLogger(__name__)
# what was picked, by kernel and by all that decides what is compiled
_PICKED: "dict[tuple[object, ...], Configuration]" = {}


class Configuration(NamedTuple):
    """How a kernel is compiled: tiles, and how they are loaded."""

    tma: bool  # descriptors of the tensor memory accelerator, else pointers
    specialized: bool  # loads and products in warps of their own
    queries: int  # rows of a tile
    keys: int
    warps: int
    stages: int
    spills: int = 0  # registers that may be spilled, as outside of the loop they cost nothing

    @property
    def constants(self) -> dict[str, int | bool]:
        """What the kernel itself is told."""
        return {
            "TMA": self.tma,
            "SPECIALIZED": self.specialized,
            "BLOCK_Q": self.queries,
            "BLOCK_K": self.keys,
        }

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        # fusion is to become an option that is off by default (Triton 3.10)
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability; that of the oldest GPU in question without one."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def padded(size: int) -> int:
    """Return the columns of the block that holds a head: a power of 2 that matrix units take."""
    return max(16, triton.next_power_of_2(size))


def rows_of(x: Tensor) -> Tensor:
    """Return x, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def fits_tma(x: Tensor) -> bool:
    """Return whether descriptors can address x (T, H, D): all strides are 16 bytes' multiples."""
    token, head, _ = (stride * x.element_size() for stride in x.stride())
    return token > 0 and not (token % 16 or head % 16 or x.data_ptr() % 16)


def compiled_by(arguments: dict[str, Any]) -> tuple[object, ...]:
    """Return what of a kernel's arguments decides what is compiled: constants, absent tensors."""
    return tuple(
        value if name.isupper() else value is None
        for name, value in arguments.items()
        if name.isupper() or name.endswith("_ptr")
    )


def launch(
    kernel: Any,
    programs: int,
    arguments: dict[str, Any],
    choices: list[Configuration],
    key: tuple[object, ...],
) -> None:
    """Run a kernel with the first of the choices that compiles, fits the GPU and spills nothing.

    Args:
        arguments: all arguments of the kernel but those of a `Configuration`; a tensor first.
        key: all that decides what is compiled. The choices are tried once for each.
    """
    # descriptors need scratch memory from an allocator, of which each thread has its own setting:
    # in a copy of the context, so that the user's is left alone
    with torch.cuda.device_of(next(iter(arguments.values()))):
        contextvars.copy_context().run(_launch, kernel, (programs,), arguments, choices, key)


def _launch(
    kernel: Any,
    grid: tuple[int],
    arguments: dict[str, Any],
    choices: list[Configuration],
    key: tuple[object, ...],
) -> None:
    triton.set_allocator(_scratch)
    # the interpreter compiles nothing
    if len(choices) > 1 and not knobs.runtime.interpret:
        if key not in _PICKED:
            _PICKED[key] = _pick(kernel, grid, arguments, choices)
        choices = [_PICKED[key]]
    kernel[grid](**arguments, **choices[0].constants, **choices[0].options)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    # torch reuses it only for what comes later on the same stream; 512 bytes are its alignment
    assert alignment <= 512
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _pick(
    kernel: Any, grid: tuple[int], arguments: dict[str, Any], choices: list[Configuration]
) -> Configuration:
    spills: dict[Configuration, int] = {}
    errors: list[Exception] = []
    for choice in choices:
        try:
            found = kernel.warmup(grid=grid, **arguments, **choice.constants, **choice.options)
            # loading shows whether it fits
            found._init_handles()
        except (TritonError, RuntimeError) as error:
            # the compiler's passes fail with a bare RuntimeError
            if not isinstance(error, TritonError) and "PassManager" not in str(error):
                raise
            _LOGGER.info("%s is not compiled as %s: %s", kernel.__name__, choice, error)
            errors.append(error)
            continue
        spills[choice] = found.n_spills
        if found.n_spills <= choice.spills:
            return choice
    if not spills:
        raise errors[-1]
    picked = min(spills, key=lambda choice: spills[choice])
    _LOGGER.info("%s spills %d registers as %s", kernel.__name__, spills[picked], picked)
    return picked
