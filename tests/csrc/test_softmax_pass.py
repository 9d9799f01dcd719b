"""The softmax passes of the C++ library, digit by digit, on every instruction set."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from apical.kernels._common import native

needs_library = pytest.mark.skipif(not native.loaded(), reason=native.status()[1])


def softmax_truth(logits: Tensor, y: Tensor, scale: Tensor, z_loss: float) -> list[Tensor]:
    """nll, lse and gradient in float64."""
    logits = logits.double().requires_grad_()
    lse = logits.logsumexp(1)
    nll = F.cross_entropy(logits, y, reduction="none")
    weighted = (nll + z_loss * lse.square()) * scale.double()
    (grad,) = torch.autograd.grad(weighted.sum(), logits)
    return [nll.detach(), lse.detach(), grad]


def exact_differences(rows: int, V: int) -> Tensor:
    """Logits whose distances to the largest are exact in float32: only our own rounding is left."""
    return (8 * torch.randn(rows, V)).mul(1024).round().div(1024)


# every length of the last vector, around one and several vectors of the widest registers
@needs_library
@pytest.mark.parametrize("V", [*range(1, 36), 63, 64, 65, 4095, 4096, 4097, 8200])
def test_keeps_every_digit(V):
    logits, y, scale = exact_differences(5, V), torch.randint(0, V, (5,)), torch.rand(5) - 0.5
    nll, lse, grad = softmax_truth(logits, y, scale, 1e-3)
    got_nll, got_lse = torch.ops.apical.softmax_nll_(logits.clone(), y)
    assert torch.equal(got_nll, torch.ops.apical.softmax_grad_(logits, y, scale, 1e-3)[0])
    torch.testing.assert_close(got_nll.double(), nll, rtol=2e-7, atol=1e-12)
    torch.testing.assert_close(got_lse.double(), lse, rtol=2e-7, atol=1e-7)
    # each entry on its own, so that small probabilities count as much as large ones
    torch.testing.assert_close(logits.double(), grad, rtol=6e-7, atol=1e-37)


@needs_library
def test_with_extreme_logits():
    inf = float("inf")
    logits = torch.tensor(
        [
            [0.0, -inf, -200.0, 1.0],  # impossible tokens
            [3e38, 0.0, -3e38, 0.0],  # near the largest float
            [-inf, 0.0, 0.0, 0.0],  # an impossible target
            [-3e38, -3e38, -3e38, -3e38],
        ]
    )
    zero = torch.zeros(4, dtype=torch.long)
    nll, lse, grad = softmax_truth(logits, zero, torch.ones(4), 0.0)
    got_nll, got_lse = torch.ops.apical.softmax_grad_(logits, zero, torch.ones(4), 0.0)
    torch.testing.assert_close(got_nll.double(), nll, rtol=1e-6, atol=0)
    torch.testing.assert_close(got_lse.double(), lse, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.double(), grad, rtol=1e-6, atol=1e-37)


@needs_library
@pytest.mark.parametrize("column", [0, 1, 20], ids=["target", "other", "tail"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_shows_what_is_not_finite(column, value):
    logits = torch.zeros(1, 21)
    logits[0, column] = value
    nll, lse = torch.ops.apical.softmax_nll_(logits, torch.zeros(1, dtype=torch.long))
    assert not torch.isfinite(torch.cat([nll, lse])).any()


@needs_library
def test_ignores_rows_with_scale_zero():
    logits = torch.full((2, 40), float("nan"))
    logits[1] = 0
    y, scale = torch.tensor([-100, 3]), torch.tensor([0.0, 1.0])
    nll, lse = torch.ops.apical.softmax_grad_(logits, y, scale, 1.0)
    assert not logits[0].any()
    assert nll[0] == lse[0] == 0
    assert logits[1].any()


@needs_library
def test_does_not_depend_on_threads():
    logits, y, scale = torch.randn(37, 1003), torch.randint(0, 1003, (37,)), torch.rand(37)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            grad = logits.clone()
            results.append((*torch.ops.apical.softmax_grad_(grad, y, scale, 1e-3), grad))
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.tensor([0, 9])}, r"target\[1\] is 9, expected 0 <= target < V = 9"),
        ({"target": torch.tensor([-1, 0])}, r"target\[0\] is -1"),
        ({"target": torch.tensor([0])}, "target must be a contiguous vector"),
        ({"target": torch.tensor([0, 1]).int()}, "target has the wrong dtype"),
        ({"scale": torch.ones(2).double()}, "scale has the wrong dtype"),
        ({"logits": torch.ones(2, 9).double()}, "logits must be float32"),
        ({"logits": torch.ones(9, 2).t()}, "logits must be a contiguous"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_checks_at_the_door(change, message):
    good = {"logits": torch.ones(2, 9), "target": torch.tensor([0, 1]), "scale": torch.ones(2)}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.apical.softmax_grad_(*(good | change).values(), 0.0)


def instruction_sets() -> list[str]:
    if not native.loaded():
        return []
    named = {"avx512": torch.cpu._is_avx512_supported, "avx2": torch.cpu._is_avx2_supported}
    return ["baseline", *(name for name, supported in named.items() if supported())]


# every set of loops that this processor can run, not only the best one
@pytest.mark.parametrize("isa", instruction_sets())
def test_every_instruction_set(isa, tmp_path):
    logits, y, scale = exact_differences(6, 4133), torch.randint(0, 4133, (6,)), torch.rand(6)
    torch.save((logits, y, scale), tmp_path / "in")
    code = f"""
import torch; from apical.kernels._common import native; assert native.loaded()
assert torch.ops.apical.cpu_isa() == {isa!r}
logits, y, scale = torch.load({str(tmp_path / "in")!r})
nll, lse = torch.ops.apical.softmax_grad_(logits, y, scale, 1e-3)
torch.save((nll, lse, logits), {str(tmp_path / "out")!r})
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "APICAL_ISA": isa}, check=True)
    for a, e in zip(
        torch.load(tmp_path / "out"), softmax_truth(logits, y, scale, 1e-3), strict=True
    ):
        torch.testing.assert_close(a.double(), e, rtol=6e-7, atol=1e-37)


@needs_library
def test_an_unknown_instruction_set_is_named():
    code = "from apical.kernels._common import native; native.loaded()\n"
    code += "import torch; torch.ops.apical.cpu_isa()"
    environment = {**os.environ, "APICAL_ISA": "sse9"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "APICAL_ISA=sse9 is unknown or not supported" in run.stderr.splitlines()[-1]
