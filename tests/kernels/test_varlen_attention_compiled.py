"""What the Triton forward kernel becomes on sm_80 and sm_90: compiled here, run nowhere."""

from typing import Any

import pytest
import torch

from apical.kernels._common.ahead_of_time import (
    SHARED,
    Launch,
    Machine,
    machine_code,
    picked,
    recorded,
)
from apical.kernels.varlen_attention import _triton_forward
from apical.kernels.varlen_attention._layout import PackedLayout
from apical.kernels.varlen_attention._rules import UNBOUNDED, Rules

from .machine_code import needs_compiler

pytestmark = needs_compiler

PLAIN = Rules(None, None, None, None, 0.125, UNBOUNDED, UNBOUNDED, UNBOUNDED, "none", 0.0, 0.0, 0.0)
CAUSAL = PLAIN._replace(right=0)
WINDOW = CAUSAL._replace(left=127)
LONG, SHORT = 1024, 200


def launch_of(
    capability: int,
    rules: Rules,
    *,
    tokens: int = LONG,
    head_size: int = 128,
    heads: int = 16,
    key_heads: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> Launch:
    """Return the one launch that the forward pass of a document makes."""
    shapes = (tokens, heads, head_size), (tokens, key_heads, head_size)
    q, k = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    with recorded(capability, _triton_forward) as launches:
        _triton_forward.forward(q, k, k, PackedLayout.from_lengths([tokens]), rules)
    (launch,) = launches
    return launch


def best(capability: int, rules: Rules, **shape: Any) -> Machine:
    """Return the machine code of the first choice."""
    launch = launch_of(capability, rules, **shape)
    return machine_code(launch, launch.choices[0], capability)


def check_fits(machine: Machine, capability: int, registers: int) -> None:
    assert machine.stack == machine.instructions["STL"] == machine.instructions["LDL"] == 0
    assert machine.registers <= registers
    assert machine.shared <= SHARED[capability]


@pytest.mark.parametrize(
    ("rules", "shape"),
    [
        # the two sizes of almost all models
        pytest.param(PLAIN, {"head_size": 64}, id="full-64"),
        pytest.param(CAUSAL, {"head_size": 128}, id="causal-128"),
        # four heads to one, and first and last key worked out in each row
        pytest.param(WINDOW, {"head_size": 128, "key_heads": 4}, id="window-gqa-128"),
        # the largest head: all of the shared memory
        pytest.param(CAUSAL, {"head_size": 256}, id="causal-256"),
        pytest.param(
            CAUSAL._replace(
                alibi_slopes=torch.empty(16, device="meta"), transform="softcap", a=50.0
            ),
            {"head_size": 64},
            id="alibi-softcap-64",
        ),
    ],
)
def test_long_documents_on_hopper_are_specialised(rules: Rules, shape: dict[str, int]):
    machine = best(90, rules, **shape)
    # twelve warps of 168 registers take 64512 of 65536, which the kinds share out among them
    check_fits(machine, 90, 168)
    assert machine.specialized
    assert machine.warps == 12
    assert machine.instructions["HGMMA"]
    assert machine.instructions["UTMALDG"]
    assert not machine.instructions["HMMA"]


def test_dropout_takes_smaller_blocks_and_spills_nothing():
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    found = picked(launch_of(90, CAUSAL._replace(seed=seed, dropout=0.1)), 90)
    assert found is not None
    choice, machine = found
    check_fits(machine, 90, 168)
    # 64 with Triton 3.9, 32 with 3.6
    assert choice.keys < 128
    assert machine.specialized


def test_a_gain_is_left_to_eight_warps():
    # the pass that specialises warps fails on a tensor that no descriptor loads
    gain = torch.empty(LONG, 16, device="meta")
    power = launch_of(90, CAUSAL._replace(gain=gain, transform="power", a=15.0, b=0.5))
    assert not any(c.specialized for c in power.choices)
    check_fits(machine_code(power, power.choices[0], 90), 90, 255)


def test_short_documents_on_hopper_leave_room_for_four():
    machine = best(90, CAUSAL, tokens=SHORT, head_size=64)
    check_fits(machine, 90, 128)
    assert machine.warps == 4
    assert machine.instructions["HGMMA"]
    assert machine.instructions["LDGSTS"]


@pytest.mark.parametrize(
    ("shape", "registers"),
    [
        pytest.param({"head_size": 64}, 255, id="64"),
        pytest.param({"head_size": 128, "key_heads": 4}, 255, id="gqa-128"),
        # too large for tiles of 128 rows
        pytest.param({"head_size": 256}, 255, id="256"),
        # outside powers of 2: the last columns of a block are masked
        pytest.param({"head_size": 80, "tokens": SHORT}, 255, id="80-short"),
    ],
)
def test_on_ampere_copies_are_asynchronous(shape: dict[str, int], registers: int):
    machine = best(80, CAUSAL, **shape)
    check_fits(machine, 80, registers)
    assert machine.instructions["HMMA"]
    assert machine.instructions["LDGSTS"]


@pytest.mark.parametrize("capability", [80, 90])
def test_float32_is_not_rounded_to_less(capability: int):
    machine = best(capability, CAUSAL, head_size=64, dtype=torch.float32)
    check_fits(machine, capability, 255)
    # matrix units would take tf32
    assert not machine.instructions["HGMMA"] + machine.instructions["HMMA"]
    assert machine.instructions["FFMA"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tokens", [SHORT, LONG])
@pytest.mark.parametrize("head_size", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_all_choices_of_a_launch_cut_tiles_alike(
    capability: int, tokens: int, head_size: int, dtype: torch.dtype
):
    launch = launch_of(capability, CAUSAL, tokens=tokens, head_size=head_size, dtype=dtype)
    rows = 64 if tokens == SHORT else 128
    # the grid is made before one is picked
    assert {c.queries for c in launch.choices} == {rows // launch.arguments["PARTS"]}
    assert not launch.choices[-1].tma
