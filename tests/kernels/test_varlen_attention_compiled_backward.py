"""What the Triton backward kernels become on sm_80 and sm_90: compiled here, run nowhere."""

from typing import Any

import pytest
import torch
import triton

from apical.kernels._common.ahead_of_time import SHARED, Launch, Machine, machine_code, recorded
from apical.kernels.varlen_attention import _triton_backward
from apical.kernels.varlen_attention._layout import PackedLayout
from apical.kernels.varlen_attention._rules import UNBOUNDED, Rules

from .machine_code import needs_compiler

pytestmark = needs_compiler

PLAIN = Rules(None, None, None, None, 0.125, UNBOUNDED, UNBOUNDED, UNBOUNDED, "none", 0, 0, 0.0)
CAUSAL = PLAIN._replace(right=0)
WINDOW = CAUSAL._replace(left=127)
LONG, SHORT = 1024, 200
# Triton 3.6 leaves some registers to be spilled, at most two of them in a loop
MORE_SPILLS = 24 if triton.__version__.startswith("3.6.") else 0


def launches_of(
    capability: int,
    rules: Rules,
    *,
    tokens: int = LONG,
    head_size: int = 128,
    heads: int = 16,
    key_heads: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Launch, Launch]:
    """Return the two launches that the backward pass of a document makes: queries, then keys."""
    shapes = (tokens, heads, head_size), (tokens, key_heads, head_size)
    q, k = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    lse, layout = torch.empty(tokens, heads, device="meta"), PackedLayout.from_lengths([tokens])
    with recorded(capability, _triton_backward) as launches:
        _triton_backward.backward(q, lse, q, k, k, q, lse, layout, rules)
    of_queries, of_keys = launches
    return of_queries, of_keys


def check_fits(machine: Machine, capability: int, *, registers: int = 255, spills: int = 0) -> None:
    assert machine.instructions["STL"] <= spills + MORE_SPILLS
    assert machine.instructions["LDL"] <= spills + MORE_SPILLS
    assert machine.registers <= registers
    assert machine.shared <= SHARED[capability]


def best(launch: Launch, capability: int) -> Machine:
    """Return the machine code of the first choice."""
    return machine_code(launch, launch.choices[0], capability)


@pytest.mark.parametrize(
    ("rules", "shape"),
    [
        # the two sizes of almost all models
        pytest.param(PLAIN, {"head_size": 64}, id="full-64"),
        pytest.param(CAUSAL, {"head_size": 128}, id="causal-128"),
        # four heads to one, and first and last row worked out for each key
        pytest.param(WINDOW, {"head_size": 128, "key_heads": 4}, id="window-gqa-128"),
    ],
)
def test_long_documents_on_hopper(rules: Rules, shape: dict[str, Any]):
    of_queries, of_keys = launches_of(90, rules, **shape)
    keys, queries = best(of_keys, 90), best(of_queries, 90)
    # twelve warps of 168 registers take 64512 of 65536, which the kinds share out among them
    check_fits(keys, 90, registers=168)
    assert keys.specialized
    assert keys.warps == 12
    # the compiler's passes do not specialise this one
    check_fits(queries, 90)
    for machine in (keys, queries):
        assert machine.instructions["HGMMA"]
        assert machine.instructions["UTMALDG"]
        assert not machine.instructions["HMMA"]


@pytest.mark.parametrize(
    ("extra", "shape"),
    [
        pytest.param({}, {"head_size": 256}, id="256"),
        # a random number for each weight
        pytest.param({"seed": torch.empty(1, dtype=torch.int64), "dropout": 0.1}, {}, id="dropout"),
        pytest.param({"transform": "softplus"}, {"head_size": 64}, id="softplus-64"),
        pytest.param(
            {"gain": torch.empty(LONG, 16), "transform": "power", "a": 15.0, "b": 0.5},
            {"head_size": 64},
            id="power-64",
        ),
    ],
)
def test_what_takes_many_registers_has_narrow_blocks(extra: dict[str, Any], shape: dict[str, Any]):
    on_meta = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in extra.items()}
    for launch in launches_of(90, CAUSAL._replace(**on_meta), **shape):
        machine = best(launch, 90)
        # heads of 256 leave hardly a register besides the sums
        check_fits(machine, 90, spills=20)
        assert not machine.specialized


@pytest.mark.parametrize("head_size", [64, 128])
def test_short_documents_on_hopper_are_loaded_by_pointer(head_size: int):
    for launch in launches_of(90, CAUSAL, tokens=SHORT, head_size=head_size):
        machine = best(launch, 90)
        check_fits(machine, 90, spills=1)
        assert machine.warps == 4
        assert machine.instructions["HGMMA"]
        assert machine.instructions["LDGSTS"]


@pytest.mark.parametrize(
    "shape", [{"head_size": 64}, {"key_heads": 4}, {"head_size": 256}], ids=str
)
def test_on_ampere_copies_are_asynchronous(shape: dict[str, Any]):
    for launch in launches_of(80, CAUSAL, **shape):
        machine = best(launch, 80)
        check_fits(machine, 80)
        assert machine.instructions["HMMA"]
        assert machine.instructions["LDGSTS"]


def test_float32_is_not_rounded_to_less():
    for launch in launches_of(80, CAUSAL, head_size=64, dtype=torch.float32):
        machine = best(launch, 80)
        check_fits(machine, 80)
        # matrix units would take tf32
        assert not machine.instructions["HMMA"]
        assert machine.instructions["FFMA"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tokens", [SHORT, LONG])
@pytest.mark.parametrize("head_size", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_all_choices_of_a_launch_cut_tiles_alike(
    capability: int, tokens: int, head_size: int, dtype: torch.dtype
):
    rows = 64 if tokens == SHORT else 128
    launches = launches_of(capability, CAUSAL, tokens=tokens, head_size=head_size, dtype=dtype)
    for launch, side in zip(launches, ("queries", "keys"), strict=True):
        # the grid is made before one is picked
        own = {getattr(choice, side) for choice in launch.choices}
        assert own == {rows // launch.arguments["PARTS"]}
        # whatever becomes of the passes that write descriptors
        assert not all(choice.tma for choice in launch.choices)


def test_tiles_of_two_sizes_are_picked_apart(monkeypatch: pytest.MonkeyPatch):
    keys: list[object] = []
    monkeypatch.setattr(_triton_backward, "launch", lambda *given: keys.append(given[4]))
    layout = PackedLayout.from_lengths([SHORT, LONG])
    q = torch.empty(SHORT + LONG, 16, 64, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(q.shape[:2], device="meta")
    _triton_backward.backward(q, None, q, q, q, q, lse, layout, CAUSAL)
    assert len(keys) == len(set(keys)) == 4
