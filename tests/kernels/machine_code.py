"""What the tests of machine code share: when they can run, and what holds for every kernel."""

import os

import pytest

from apical.kernels._common.ahead_of_time import SHARED, Launch, Machine, machine_code

needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


def best(launch: Launch, capability: int) -> Machine:
    """Return the machine code of the first choice; it fits, and nothing spills."""
    machine = machine_code(launch, launch.choices[0], capability)
    assert machine.stack == machine.instructions["STL"] == machine.instructions["LDL"] == 0
    assert machine.shared <= SHARED[capability]
    return machine
