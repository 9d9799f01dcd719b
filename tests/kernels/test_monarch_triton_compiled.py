"""What the Triton kernel of Monarch becomes on sm_80 and sm_90: compiled here, run nowhere."""

import pytest
import torch
from torch import Tensor

from apical.kernels._common.ahead_of_time import Launch, recorded
from apical.kernels.monarch import _triton, _triton_launch

from .machine_code import best, needs_compiler

pytestmark = needs_compiler

# in the order of their launch
NAMES = "first", "second", "second's gradient", "hidden's", "input's", "first's"


def launches(
    capability: int,
    *,
    tokens: int = 16384,
    size: int = 4096,
    blocks: int = 4,
    rank: int = 256,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Launch]:
    """Return what both passes of a square layer launch."""

    def meta(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    run = size // blocks
    x, bias = meta(tokens, size), meta(size)
    first, second = meta(blocks, rank * blocks, run), meta(blocks, run, blocks * rank)
    with recorded(capability, _triton_launch) as found:
        out, hidden = _triton.forward(x, first, second, bias, True)
        _triton.backward(out, x, first, second, hidden, [True] * 4)
    return dict(zip(NAMES, found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_on_hopper(name: str):
    machine = best(launches(90)[name], 90)
    assert machine.instructions["HGMMA"]
    assert not machine.instructions["HMMA"]


@pytest.mark.parametrize("name", NAMES)
def test_on_ampere(name: str):
    machine = best(launches(80)[name], 80)
    assert machine.instructions["HMMA"]


@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize("capability", [80, 90])
def test_rows_are_copied_asynchronously(name: str, capability: int):
    machine = best(launches(capability)[name], capability)
    assert machine.instructions["LDGSTS"]
    assert "cp.async.cg.shared.global" in machine.ptx  # 16 bytes at a time


# rank 1: every index of hidden is a row of its own
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("capability", [80, 90])
def test_of_rank_1(name: str, capability: int):
    best(launches(capability, blocks=64, rank=1)[name], capability)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_multiplied_exactly(name: str):
    machine = best(launches(90, dtype=torch.float32)[name], 90)
    assert machine.instructions["FFMA"]
    assert not machine.instructions["HMMA"] + machine.instructions["HGMMA"]
