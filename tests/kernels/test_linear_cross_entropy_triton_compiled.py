"""What the Triton kernels of the loss become on sm_80 and sm_90: compiled here, run nowhere."""

from typing import Any

import pytest
import torch

from apical.kernels._common.ahead_of_time import (
    Launch,
    Machine,
    recorded,
)
from apical.kernels.linear_cross_entropy import _triton, _triton_launch
from apical.kernels.linear_cross_entropy._rules import Rules

from .linear_cross_entropy_definition import PLAIN
from .machine_code import best, needs_compiler

pytestmark = needs_compiler

CAPPED = PLAIN._replace(softcap=30.0, z_loss=1e-4)
SMOOTH = PLAIN._replace(smoothing=0.1)
EVERY = CAPPED._replace(smoothing=0.1, logit_scale=0.5)
FORWARD = [
    "gather_kernel", "exponentials_kernel", "finish_kernel", "exponentials_kernel",
    "finish_kernel", "labels_kernel", "input_kernel", "weight_kernel", "bias_kernel",
]  # fmt: skip


def launches(
    capability: int,
    rules: Rules = PLAIN,
    *,
    again: bool = False,
    hidden: int = 1024,
    tokens: int = 4096,
    classes: int = 32768,
    labels: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    filtered: bool = False,
) -> list[Launch]:
    """Return what one op launches: forward, or backward `again`."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    args = (
        meta(tokens, hidden, dtype=dtype),
        meta(classes, hidden, dtype=dtype),
        meta(classes, dtype=dtype) if bias else None,
        meta(tokens, labels, dtype=torch.int64),
        meta(tokens, labels),
        meta(classes) if rules.smoothing and bias else None,
    )
    wanted = True, True, bias
    with recorded(capability, _triton_launch) as found:
        if again:
            valid = meta(tokens, dtype=torch.bool)
            upstream = (meta(tokens), None, None)
            _triton.backward(*upstream, *args, meta(tokens), valid, *rules, *wanted)
        else:
            _triton.forward(*args, meta(tokens), *rules, *wanted, filtered=filtered)
    return found


def first(found: list[Launch], name: str) -> Launch:
    return next(launch for launch in found if launch.kernel.__name__ == f"{name}_kernel")


def test_a_forward_pass_is_nine_kernels():
    assert [launch.kernel.__name__ for launch in launches(90, bias=True)] == FORWARD


def check_hopper(machine: Machine) -> None:
    assert machine.instructions["HGMMA"]
    assert "wgmma.mma_async" in machine.ptx
    assert machine.instructions["UTMALDG"]
    assert not machine.instructions["HMMA"]
    assert machine.registers <= 255


@pytest.mark.parametrize(
    ("rules", "options"),
    [
        # plain: both times a chunk's exponentials are made
        pytest.param(PLAIN, {}, id="plain"),
        # what follows the product in Gemma 2, and in a smoothed loss with a bias
        pytest.param(CAPPED, {}, id="softcap"),
        pytest.param(SMOOTH, {"bias": True}, id="smoothing-bias"),
        pytest.param(PLAIN, {"again": True}, id="backward"),
        # the most that can follow the product
        pytest.param(EVERY, {"again": True, "bias": True, "labels": 5}, id="backward-every"),
    ],
)
def test_exponentials_on_hopper(rules: Rules, options: dict[str, Any]):
    check_hopper(best(first(launches(90, rules, **options), "exponentials"), 90))


def test_exponentials_that_are_done_again_on_hopper():
    found = [one for one in launches(90) if one.kernel.__name__ == "exponentials_kernel"]
    assert [one.arguments["again_ptr"] is None for one in found] == [True, False]
    check_hopper(best(found[1], 90))


@pytest.mark.parametrize("name", ["input", "weight"])
def test_products_on_hopper(name: str):
    check_hopper(best(first(launches(90), name), 90))


def test_a_second_chunk_adds_on_hopper():
    found = launches(90, tokens=40000, classes=65536)
    adding = [x for x in found if x.kernel.__name__ == "weight_kernel" and x.arguments["ADD"]]
    assert adding
    check_hopper(best(adding[0], 90))


@pytest.mark.parametrize("name", ["exponentials", "input", "weight"])
def test_products_on_ampere(name: str):
    machine = best(first(launches(80), name), 80)
    assert machine.instructions["HMMA"]
    assert machine.instructions["LDGSTS"]


@pytest.mark.parametrize(
    ("rules", "options"),
    [
        pytest.param(CAPPED, {}, id="softcap"),
        # the most that can follow the product
        pytest.param(EVERY, {"again": True, "bias": True, "labels": 5}, id="backward-every"),
    ],
)
def test_exponentials_on_ampere(rules: Rules, options: dict[str, Any]):
    found = launches(80, rules, **options)
    assert best(first(found, "exponentials"), 80).instructions["LDGSTS"]


@pytest.mark.parametrize("name", ["input", "weight"])
def test_filtered_products(name: str):
    # the list is loaded ahead too, and as many blocks are as without it
    machine = best(first(launches(90, filtered=True), name), 90)
    check_hopper(machine)
    plain = best(first(launches(90), name), 90)
    assert machine.instructions["UTMALDG"] == plain.instructions["UTMALDG"]
    assert best(first(launches(80, filtered=True), name), 80).instructions["LDGSTS"]


def test_a_filter_is_one_kernel_more():
    names = [launch.kernel.__name__ for launch in launches(90, bias=True, filtered=True)]
    assert names == [*FORWARD[:5], "active_kernel", *FORWARD[5:]]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("again", [False, True], ids=["forward", "backward"])
def test_rows_of_any_size_are_widened(capability: int, again: bool):
    # so nothing that is compiled differs, and what does not spill for one does not for the other
    both = [launches(capability, hidden=hidden, again=again) for hidden in (1008, 1001)]
    for one, other in zip(*both, strict=True):
        assert one.kernel is other.kernel
        assert one.choices == other.choices
        for name, value in one.arguments.items():
            assert getattr(value, "shape", value) == getattr(other.arguments[name], "shape", value)


# what rows need, whatever the products are made by
@pytest.mark.parametrize("name", ["gather", "finish", "active", "labels", "bias"])
def test_kernels_without_products(name: str):
    best(first(launches(90, bias=True, filtered=True), name), 90)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["input", "weight"])
def test_float16_is_multiplied_with_eight_bits_of_exponent(capability: int, name: str):
    launch = first(launches(capability, dtype=torch.float16), name)
    assert launch.arguments["e_ptr"].dtype == torch.float32
    machine = best(launch, capability)
    assert "tf32" in machine.ptx


@pytest.mark.parametrize("capability", [80, 90])
# rows that descriptors can address, and rows that they could not
@pytest.mark.parametrize("hidden", [1024, 1023])
@pytest.mark.parametrize("rules", [PLAIN, CAPPED, SMOOTH, EVERY], ids=str)
def test_all_choices_of_a_launch_cut_tiles_alike(capability: int, hidden: int, rules: Rules):
    for launch in launches(capability, rules, hidden=hidden):
        tiles = {(c.rows, c.columns) for c in launch.choices if hasattr(c, "rows")}
        # the grid and the number of sums are made before one is picked
        assert len(tiles) <= 1
        if hasattr(launch.choices[0], "tma"):
            assert all(c.tma == (capability == 90) for c in launch.choices)
