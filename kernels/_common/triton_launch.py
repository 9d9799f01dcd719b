"""Launching Triton kernels: with the first way to compile one that fits and spills nothing."""

import contextvars
import functools
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.errors import TritonError

_LOGGER = logging.getLogger(__name__)
# what was picked, by kernel and by all that decides what is compiled
_PICKED: "dict[tuple[object, ...], Choice]" = {}


class Choice(Protocol):
    """How a kernel is compiled."""

    @property
    def warps(self) -> int:
        """Of a program."""
        ...

    @property
    def stages(self) -> int:
        """Blocks that are loaded ahead, and the one that is multiplied."""
        ...

    @property
    def spills(self) -> int:
        """Registers that may be spilled."""
        ...

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernel itself is told."""
        ...


def options_of(choice: Choice) -> dict[str, Any]:
    """Return what the compiler is told."""
    # fusion is to become an option that is off by default (Triton 3.10)
    return {"num_warps": choice.warps, "num_stages": choice.stages, "enable_fp_fusion": True}


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability; that of the oldest GPU in question without one."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors; a handful where there is no GPU."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    choices: Sequence[Choice],
    key: tuple[object, ...],
) -> None:
    """Run a kernel with the first of the choices that compiles, fits the GPU and spills nothing.

    Args:
        arguments: all arguments of the kernel but those of a choice; a tensor first.
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
    choices: Sequence[Choice],
    key: tuple[object, ...],
) -> None:
    triton.set_allocator(_scratch)
    # the interpreter compiles nothing
    if len(choices) > 1 and not knobs.runtime.interpret:
        if key not in _PICKED:
            _PICKED[key] = _pick(kernel, grid, arguments, choices)
        choices = [_PICKED[key]]
    kernel[grid](**arguments, **choices[0].constants, **options_of(choices[0]))


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    # torch reuses it only for what comes later on the same stream; 512 bytes are its alignment
    assert alignment <= 512
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _pick(
    kernel: Any, grid: tuple[int], arguments: dict[str, Any], choices: Sequence[Choice]
) -> Choice:
    spills: list[tuple[int, int]] = []
    errors: list[Exception] = []
    for i, choice in enumerate(choices):
        try:
            named = arguments | choice.constants | options_of(choice)
            found = kernel.warmup(grid=grid, **named)
            # loading shows whether it fits
            found._init_handles()
        except (TritonError, RuntimeError) as error:
            # the compiler's passes fail with a bare RuntimeError
            if not isinstance(error, TritonError) and "PassManager" not in str(error):
                raise
            _LOGGER.info("%s is not compiled as %s: %s", kernel.__name__, choice, error)
            errors.append(error)
            continue
        spills.append((found.n_spills, i))
        if found.n_spills <= choice.spills:
            return choice
    if not spills:
        raise errors[-1]
    least, i = min(spills)
    _LOGGER.info("%s spills %d registers as %s", kernel.__name__, least, choices[i])
    return choices[i]
