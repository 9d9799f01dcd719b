"""What the Triton kernels of blocks become on sm_80 and sm_90: compiled here, run nowhere."""

import pytest
import torch
from torch import Tensor

from apical.kernels._common.ahead_of_time import (
    SHARED,
    Launch,
    Machine,
    picked,
    recorded,
)
from apical.kernels.sparse_low_rank import _triton, _triton_launch

from .machine_code import best, needs_compiler

pytestmark = needs_compiler

NAMES = "forward", "input", "values"


def launches(
    capability: int,
    *,
    tokens: int = 16384,
    size: int = 4096,
    block: tuple[int, int] = (128, 16),
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Launch]:
    """Return what both passes of a square layer launch, by the kernel's name."""
    groups, across = -(-size // block[0]), size // block[1]
    blocks = groups * max(across // 32, 1)

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, a, b = meta(tokens, size), meta(size // 4, size), meta(size, size // 4)
    values, bias = meta(blocks * block[0] * block[1]), meta(size)
    sizes = groups + 1, blocks, across + 1, blocks, blocks
    index = [meta(n, dtype=torch.int32) for n in sizes]
    layout = [1, size, size, *block]
    with recorded(capability, _triton_launch) as found:
        out, hidden = _triton.forward(x, a, b, values, bias, index, layout, 0.5)
        _triton.backward(out, x, a, b, values, hidden, index, layout, 0.5, [True] * 5)
    assert [launch.kernel.__name__ for launch in found] == [f"{name}_kernel" for name in NAMES]
    return dict(zip(NAMES, found, strict=True))


def check_hopper(machine: Machine) -> None:
    assert machine.instructions["HGMMA"]
    assert "wgmma.mma_async" in machine.ptx
    assert machine.instructions["UTMALDG"]
    # what a list of blocks points to is copied 16 bytes at a time
    assert "cp.async.cg.shared.global" in machine.ptx
    assert not machine.instructions["HMMA"]


@pytest.mark.parametrize("name", NAMES)
def test_on_hopper(name: str):
    check_hopper(best(launches(90)[name], 90))


@pytest.mark.parametrize("name", NAMES)
# half of a multiprocessor's registers and memory: two blocks of 256 threads at a time
def test_few_tiles_on_hopper(name: str):
    launch = launches(90, tokens=256, size=256)[name]
    assert launch.choices[0].rows <= 128
    machine = best(launch, 90)
    check_hopper(machine)
    assert machine.registers <= 128
    assert 2 * machine.shared <= SHARED[90]


@pytest.mark.parametrize("name", NAMES)
def test_on_ampere(name: str):
    machine = best(launches(80)[name], 80)
    assert machine.instructions["HMMA"]
    assert machine.instructions["LDGSTS"]


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_multiplied_exactly(name: str):
    # registers of addresses differ between versions of Triton: the first choice may spill
    found = picked(launches(90, dtype=torch.float32)[name], 90)
    assert found
    machine = found[1]
    assert machine.stack == machine.instructions["STL"] == machine.instructions["LDL"] == 0
    assert machine.instructions["FFMA"]
    assert not machine.instructions["HMMA"] + machine.instructions["HGMMA"]


@pytest.mark.parametrize("capability", [80, 90])
# rows that descriptors can address, and rows that they cannot
@pytest.mark.parametrize("size", [4096, 4100])
@pytest.mark.parametrize("block", [(128, 16), (48, 20)], ids=str)
def test_all_choices_of_a_launch_cut_tiles_alike(
    capability: int, size: int, block: tuple[int, int]
):
    for launch in launches(capability, size=size, block=block).values():
        # the grid is made before one is picked
        assert len({(choice.rows, choice.columns) for choice in launch.choices}) == 1
        for choice in launch.choices:
            assert choice.tma == (capability == 90 and size == 4096)
            # no tile of rows lies in two groups
            if launch.kernel.__name__ != "input_kernel":
                assert block[0] % choice.columns == 0
            else:
                assert block[0] % choice.depth == 0
