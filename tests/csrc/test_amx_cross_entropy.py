"""The loss of a chunk of tokens on the matrix unit, and gradients on their way to bfloat16."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from apical.kernels._common import native

pytestmark = pytest.mark.skipif(
    not (native.loaded() and torch.ops.apical.amx_supported()),
    reason="no library, or no matrix unit",
)

GRADIENTS = ("grad_input", "grad_weight")


def inputs(C: int = 70, H: int = 50, V: int = 300) -> dict[str, Any]:
    """The arguments of the op, in order."""
    return {
        "x": torch.randn(C, H).bfloat16(),
        "weight": (torch.randn(V, H) * H**-0.5).bfloat16(),
        "ids": torch.randint(0, V, (C,)),
        "id_weight": torch.rand(C),
        "token_weight": torch.randn(C),
        "z_loss": 0.01,
        "logit_scale": 1.5,
        "exps": torch.empty(96 * 320, dtype=torch.bfloat16),
        "grad_input": torch.empty(C, H),
        "grad_weight": torch.empty(V, H),
        "add": False,
    }


def call(arguments: dict[str, Any]) -> tuple[Any, ...]:
    return torch.ops.apical.amx_cross_entropy(*arguments.values())


def exact(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return loss, nll, lse, entropy, correct and both gradients, in float64."""
    x, W = (arguments[name].double().requires_grad_() for name in ("x", "weight"))
    ids, z = arguments["ids"], arguments["logit_scale"] * (x @ W.t())
    nll, lse = F.cross_entropy(z, ids, reduction="none"), z.logsumexp(1)
    loss = arguments["id_weight"] * nll + arguments["z_loss"] * lse.square()
    (arguments["token_weight"] * loss).sum().backward()
    entropy = torch.special.entr(z.softmax(1)).sum(1)
    assert x.grad is not None
    assert W.grad is not None
    return loss, nll, lse, entropy, (z.argmax(1) == ids).double(), x.grad, W.grad


def hold(arguments: dict[str, Any], found: tuple[Any, ...], before: Tensor | float = 0.0) -> None:
    *values, usable = found
    assert usable
    *truths, grad_x, grad_W = exact(arguments)
    for value, truth in zip(values, truths, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=2e-6, atol=2e-6)
    for name, truth in (("grad_input", grad_x), ("grad_weight", grad_W)):
        actual = arguments[name].double() - (before if name == "grad_weight" else 0.0)
        # exponentials, and tokens times their factors, are rounded to bfloat16; targets are not
        assert (actual - truth).norm() <= 3e-3 * truth.norm()


@pytest.mark.parametrize("C", [1, 32, 70])
@pytest.mark.parametrize("H", [16, 50, 64])
@pytest.mark.parametrize("V", [5, 288, 300])
def test_values_and_gradients(C, H, V):
    arguments = inputs(C, H, V)
    hold(arguments, call(arguments))


def test_adds_to_the_gradient_of_the_weight():
    before = torch.randn(300, 50)
    arguments = inputs() | {"grad_weight": before.clone(), "add": True}
    hold(arguments, call(arguments), before.double())


def test_all_tokens_have_one_target():
    # their gradients at it add up
    arguments = inputs() | {"ids": torch.full((70,), 37)}
    hold(arguments, call(arguments))


@pytest.mark.parametrize("bad", [60.0, 1000.0, float("nan"), float("inf"), float("-inf")])
def test_out_of_reach_writes_no_gradient(bad):
    arguments = inputs()
    arguments["x"][69] = arguments["weight"][3] = torch.zeros(50).bfloat16()
    arguments["x"][69, 0], arguments["weight"][3, 0], arguments["ids"][69] = 1.0, bad, 5
    arguments["grad_input"].fill_(7)
    arguments["grad_weight"].fill_(7)
    *_, usable = call(arguments)
    # minus infinity, too: the zeros of other tokens make NaN of it
    assert not usable
    assert (arguments["grad_input"] == 7).all()
    assert (arguments["grad_weight"] == 7).all()


def test_writes_nothing_else():
    arguments = inputs()
    around = {name: torch.full((arguments[name].numel() + 99,), 7.0) for name in GRADIENTS}
    for name, memory in around.items():
        size = arguments[name].numel()
        arguments[name] = memory[33 : 33 + size].view(arguments[name].shape)
    hold(arguments, call(arguments))
    for name, memory in around.items():
        assert (memory[:33] == 7).all(), name
        assert (memory[33 + arguments[name].numel() :] == 7).all(), name


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeats_to_the_bit(threads):
    # five strips of the vocabulary
    arguments, before, results = inputs(V=1200), torch.get_num_threads(), []
    arguments["exps"] = torch.empty(96 * 1216, dtype=torch.bfloat16)
    try:
        torch.set_num_threads(threads)
        for _ in range(2):
            *values, _ = found = call(arguments)
            hold(arguments, found)
            results.append([*values, *(arguments[name].clone() for name in GRADIENTS)])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(70, 50)}, "x must be bfloat16"),
        ({"x": torch.zeros(0, 50).bfloat16()}, "C and H at least 1"),
        ({"weight": torch.zeros(300, 49).bfloat16()}, "weight must be contiguous"),
        ({"ids": torch.full((70,), 300)}, r"ids\[0\] is 300, expected 0 <= id < V = 300"),
        ({"ids": torch.full((70,), -1)}, r"ids\[0\] is -1"),
        ({"token_weight": torch.zeros(69)}, "token_weight must be contiguous and of 70 rows"),
        ({"logit_scale": 0.0}, "logit_scale must be finite and not 0"),
        ({"exps": None}, "grad_weight needs exps"),
        ({"exps": torch.zeros(9).bfloat16()}, "of at least 30720 elements"),
        ({"grad_input": torch.zeros(50, 70).t()}, "grad_input must be contiguous"),
        ({"grad_weight": torch.zeros(300, 50).double()}, "grad_weight must be float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_checks_at_the_door(change, message):
    with pytest.raises(RuntimeError, match=message):
        call(inputs() | change)


# elements: none, one, both sides of a cache line, more than a thread's part
@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 70000])
def test_rounded_once(size):
    grad, factor = torch.randn(size), torch.tensor(0.3)
    rounded = torch.ops.apical.amx_rounded(grad, factor)
    assert torch.equal(rounded, (grad * factor).bfloat16())
    assert rounded.dtype == torch.bfloat16


def test_rounding_keeps_what_is_not_finite():
    grad = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38])
    rounded = torch.ops.apical.amx_rounded(grad, torch.tensor(1.0))
    torch.testing.assert_close(rounded, grad.bfloat16(), equal_nan=True)
