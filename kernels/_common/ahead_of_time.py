"""What a Triton kernel becomes on a GPU that need not be there: registers, spills, instructions."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .triton_launch import options_of

# what tells loads by descriptor (UTMALDG), asynchronous copies (LDGSTS), products of warp groups
# (HGMMA) and of warps (HMMA) apart; STL and LDL are spills
INSTRUCTIONS = ("HGMMA", "HMMA", "FFMA", "MUFU", "UTMALDG", "LDGSTS", "STL", "LDL")
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


# bytes of shared memory that a block may have (CUDA C++ Programming Guide, table of capabilities)
SHARED = {80: 163 * 1024, 90: 227 * 1024}


class Launch(NamedTuple):
    """A kernel, the arguments it would have been launched with, and the ways to compile it."""

    kernel: Any
    arguments: dict[str, Any]
    choices: list[Any]


class Machine(NamedTuple):
    """Machine code of one kernel."""

    registers: int  # per thread, at the launch
    stack: int  # bytes per thread: where registers spill to
    shared: int  # bytes
    warps: int  # with those of loads
    instructions: dict[str, int]
    ptx: str

    @property
    def specialized(self) -> bool:
        """Whether warps divide the work: each kind asks for its own number of registers."""
        return "setmaxnreg" in self.ptx


@contextmanager
def recorded(capability: int, *modules: ModuleType) -> Iterator[list[Launch]]:
    """List what these modules launch instead of launching it, as if on a GPU of this capability.

    Args:
        capability: 80, 90, …
        modules: call ``capability`` and ``launch`` of their own namespace. Tensors may be "meta".
    """
    launches: list[Launch] = []

    def record(kernel: Any, _: int, arguments: dict[str, Any], choices: list[Any], __: Any) -> None:
        launches.append(Launch(kernel, arguments, choices))

    stands_in = {"launch": record, "capability": lambda _: divmod(capability, 10)}
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.multiple(module, **stands_in))
        yield launches


def picked(launch: Launch, capability: int) -> tuple[Any, Machine] | None:
    """Return what a launch takes: the first choice that fits and spills no more than it may."""
    found: list[tuple[Any, Machine]] = []
    for choice in launch.choices:
        try:
            machine = machine_code(launch, choice, capability)
        except RuntimeError as error:
            if "PassManager" not in str(error):
                raise
            continue
        if machine.shared > SHARED[capability]:
            continue
        # registers are words
        if machine.stack <= 4 * choice.spills:
            return choice, machine
        found.append((choice, machine))
    return min(found, key=lambda one: one[1].stack, default=None)


def machine_code(launch: Launch, choice: Any, capability: int) -> Machine:
    """Compile a kernel as its launch would, for sm_80, sm_90 …; no GPU needed.

    Args:
        choice: a ``triton_launch.Choice``; its ``constants`` are more arguments.
    """
    kernel, arguments = launch.kernel, launch.arguments | choice.constants
    source = ASTSource(kernel, *_specialization(kernel, arguments))
    target = GPUTarget("cuda", capability, 32)
    found = triton.compile(source, target=target, options=options_of(choice))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(found.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", path)
        code = _cuobjdump("--dump-sass", path)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers, usage
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
    warps = getattr(found.metadata, "total_num_warps", None) or found.metadata.num_warps
    registers, stack = map(int, numbers.groups())
    return Machine(registers, stack, found.metadata.shared, warps, counts, found.asm["ptx"])


def _specialization(
    kernel: Any, arguments: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    # as a launch does it: 1 and None become constants, multiples of 16 are marked
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        plain = parameter.do_not_specialize
        one = isinstance(value, int) and value == 1 and not plain
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = _type_of(value)
        # tensors of torch's allocator lie at multiples of 512 bytes
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and not plain):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type_of(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _cuobjdump(flag: str, path: Path) -> str:
    assert triton.__file__ is not None
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout
