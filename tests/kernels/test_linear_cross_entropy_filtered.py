"""impl="filtered" as a user calls it: where it leaves nothing out, and where the kernels get it."""

from typing import Any

import pytest
import torch

from apical import linear_cross_entropy
from apical.kernels.linear_cross_entropy import _checks, _chunked, _triton

from .linear_cross_entropy_cases import IGNORE, leaf

pytestmark = pytest.mark.usefixtures("one_thread")


def outputs(impl: str, dtype: torch.dtype, **options: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = leaf(torch.randn(40, 24, generator=generator) * 9, dtype)
    w = leaf(torch.randn(300, 24, generator=generator), dtype)
    target = torch.arange(40).masked_fill(torch.arange(40) % 3 == 0, IGNORE)
    out = linear_cross_entropy(x, w, target, impl=impl, **options)
    grads = torch.autograd.grad(out.loss.sum(), (x, w))
    return [out.loss.detach(), out.nll.detach(), out.entropy, out.accuracy, *grads]


# the kernels of GPUs take half precision alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_on_the_cpu_nothing_is_left_out(dtype: torch.dtype, reduction: str):
    found = (outputs(impl, dtype, reduction=reduction) for impl in ("fused", "filtered"))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("impl", ["fused", "filtered"])
def test_the_kernels_are_told(impl: str, monkeypatch: pytest.MonkeyPatch):
    told: list[bool] = []

    def forward(*arguments: Any, filtered: bool = False) -> Any:
        told.append(filtered)
        return _chunked.forward(*arguments)

    monkeypatch.setattr(_triton, "takes", lambda *_: True)
    monkeypatch.setattr(_triton, "forward", forward)
    outputs(impl, torch.bfloat16)
    assert told == [impl == "filtered"]


def test_the_op_and_its_description_agree():
    x, w = torch.randn(5, 8), torch.randn(7, 8)
    labels = torch.randint(0, 7, (5, 1)), torch.ones(5, 1), None, torch.ones(5)
    op = torch.ops.apical.linear_cross_entropy_forward.default
    arguments = (x, w, None, *labels, 0.0, 0.0, 0.0, 1.0, True, True, False)
    torch.library.opcheck(op, arguments, {"filtered": True})


# dynamo makes an instance of every torch.autograd.Function, which torch warns of
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_torch_compile_keeps_the_choice_in_one_graph():
    x, w, target = torch.randn(5, 8), torch.randn(7, 8), torch.randint(0, 7, (5,))

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, w, target, impl="filtered").loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    one, other = leaf(x), leaf(x)
    for function, hidden in ((loss, one), (compiled, other)):
        function(hidden).backward()
    assert torch.equal(one.grad, other.grad)  # pyright: ignore[reportArgumentType]


def test_ranks_with_slices_of_the_vocabulary_leave_nothing_out():
    with pytest.raises(ValueError, match="impl='filtered' takes no process_group; use impl="):
        _checks.choices("mean", "filtered", grouped=True)
