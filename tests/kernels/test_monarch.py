"""The Monarch product on the CPU: values, gradients, ops under torch's checks, refusals."""

import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from apical import monarch_matmul
from apical.kernels.monarch import _cpu, _regrouped, ops

from .monarch_cases import SHAPES, Operands, by_hand, exact, sample

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = "output", "input", "first", "second", "bias"
Check = Callable[[Tensor, Tensor, Tensor, str], None]


@pytest.fixture(params=[_cpu, _regrouped], ids=["blocks", "regrouped"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Both ways, in every dtype: which one a machine takes depends on its units."""
    monkeypatch.setattr(ops, "implementation", lambda _: request.param)
    # several blocks of tokens, the last one smaller
    monkeypatch.setattr(_cpu, "_BLOCK", 16)
    return request.param


def with_grads(given: Operands, grad: Tensor, impl: str = "fused") -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in given if x is not None]
    bias = leaves[3] if given.bias is not None else None
    out = monarch_matmul(*leaves[:3], bias=bias, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(given: Operands, check_error: Check) -> None:
    grad = torch.randn(len(given.input), given.out_features).to(given.input.dtype)
    parts = zip(
        NAMES,
        with_grads(given, grad),
        exact(given, grad),
        with_grads(given, grad, "reference"),
        strict=False,
    )
    for name, ours, truth, plain in parts:
        check_error(ours, truth, plain, name)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_product_and_gradients(shape: dict[str, Any], dtype: torch.dtype, check_error: Check):
    check(sample(**shape, dtype=dtype), check_error)
    check(sample(**shape, bias=False, dtype=dtype), check_error)


# a token alone, and one less and more than a block of the fused way
@pytest.mark.parametrize("tokens", [1, 511, 512, 513])
def test_numbers_of_tokens(tokens: int, check_error: Check):
    check(sample(tokens=tokens), check_error)


def test_float16_on_the_cpu(check_error: Check):
    check(sample(dtype=torch.float16), check_error)


@pytest.mark.usefixtures("implementation")
def test_any_strides(check_error: Check):
    given = sample()
    m, n = given.input.shape[1], given.out_features
    turned = given._replace(
        input=torch.randn(37, 2 * m + 3)[:, 3::2],
        first=given.first.transpose(1, 2).contiguous().transpose(1, 2),
        second=given.second.transpose(0, 2).contiguous().transpose(0, 2),
    )
    grad = torch.randn(n).expand(37, n)
    parts = zip(
        with_grads(turned, grad),
        exact(turned, grad),
        with_grads(turned, grad, "reference"),
        strict=True,
    )
    for ours, truth, plain in parts:
        check_error(ours, truth, plain, "strided")


def test_leading_axes():
    given = sample(tokens=24)
    flat = monarch_matmul(*given[:3], bias=given.bias)
    for shape in ((2, 3, 4), (24, 1), (1, 24)):
        got = monarch_matmul(given.input.view(*shape, -1), *given[1:3], bias=given.bias)
        assert torch.equal(got, flat.view(*shape, -1))
    one = monarch_matmul(given.input[0], *given[1:3], bias=given.bias)
    torch.testing.assert_close(one, flat[0])
    assert monarch_matmul(given.input[:0].view(0, 5, 21), *given[1:3]).shape == (0, 5, 24)


def test_the_reference_is_the_matrix_entry_by_entry():
    given = sample(dtype=torch.float64)
    got = monarch_matmul(*given[:3], bias=given.bias, impl="reference")
    assert given.bias is not None
    expected = given.input @ by_hand(given.first, given.second).T + given.bias
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_gradcheck_of_the_reference():
    leaves = [x.requires_grad_() for x in sample(tokens=3, dtype=torch.float64) if x is not None]

    def product(*tensors: Tensor) -> Tensor:
        return monarch_matmul(*tensors[:3], bias=tensors[3], impl="reference")

    assert torch.autograd.gradcheck(product, tuple(leaves))
    assert torch.autograd.gradgradcheck(product, tuple(leaves))


def test_the_fused_product_is_differentiable_once():
    given = sample()
    first = given.first.requires_grad_()
    out = monarch_matmul(given.input, first, given.second).square().sum()
    (grad,) = torch.autograd.grad(out, first, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.usefixtures("implementation")
def test_not_finite_tokens_change_no_other():
    given = sample()
    before = monarch_matmul(*given[:3], bias=given.bias)
    given.input[5] = torch.nan
    after = monarch_matmul(*given[:3], bias=given.bias)
    rows = torch.arange(37) != 5
    torch.testing.assert_close(after[rows], before[rows], rtol=0, atol=0)
    assert after[5].isnan().all()


@pytest.mark.usefixtures("implementation")
# memory of single features has strides of its own
@pytest.mark.parametrize("name", ["ragged", "single-features", "one-comb"])
def test_opcheck(name: str):
    *tensors, bias = sample(**SHAPES[name])  # pyright: ignore[reportArgumentType]
    n = len(tensors[2]) * tensors[2].shape[1]
    for given in (bias, None):
        for keep in (True, False):
            torch.library.opcheck(ops.forward, (*tensors, given, keep))
    _, hidden = ops.forward(*tensors, bias, True)
    # all, none, and each without the others
    wanted = [[True] * 4, [False] * 4, *([i == k for i in range(4)] for k in range(4))]
    for each in wanted:
        kept = hidden if each[2] else hidden.new_empty(0)
        torch.library.opcheck(ops.backward, (torch.randn(37, n), *tensors, kept, each))


@pytest.mark.usefixtures("implementation")
def test_only_what_is_wanted_is_computed():
    given = sample()
    grad = torch.randn(37, 24)
    whole = with_grads(given, grad)
    for i in range(4):
        leaves = [x.detach().requires_grad_(i == k) for k, x in enumerate(given) if x is not None]
        out = monarch_matmul(*leaves[:3], bias=leaves[3])
        (got,) = torch.autograd.grad(out, leaves[i], grad)
        assert torch.equal(got, whole[i + 1])


@pytest.mark.usefixtures("implementation")
def test_without_gradients_the_bits_are_the_same():
    given = sample(tokens=50)
    second = given.second.requires_grad_()
    trained = monarch_matmul(given.input, given.first, second, bias=given.bias)
    with torch.no_grad():
        got = monarch_matmul(given.input, given.first, second, bias=given.bias)
        assert ops.forward(*given[:3], given.bias, False)[1].shape == (0,)
    assert torch.equal(got, trained)


@pytest.mark.parametrize("trained", [True, False])
def test_hidden_is_kept_for_the_second_factor_alone(trained: bool):
    given, saved = sample(), []
    leaves = [given.input, given.first.requires_grad_(), given.second.requires_grad_(trained)]

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        monarch_matmul(*leaves)
    assert ((37, 60) in saved) == trained
    # never the matrix, nor the output
    assert all(shape not in saved for shape in ((24, 21), (37, 24)))


COMPILED = """
import torch, apical
def product(x, first, second, bias):
    y = apical.monarch_matmul(x, first, second, bias=bias)
    return apical.monarch_matmul(y.tanh()[:, :21], first, second)
fast = torch.compile(product, fullgraph=True, dynamic=True, backend="aot_eager")
for tokens in (5, 9):
    shapes = (tokens, 21), (3, 20, 7), (4, 6, 15), (24,)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    got, expected = fast(*leaves), product(*leaves)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    grads = torch.autograd.grad(got, leaves, upstream)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, upstream))
print("ok")
"""


def test_compile_is_the_first_call_of_a_process():
    command = [sys.executable, "-c", COMPILED]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout == "ok\n", run.stderr[-2000:]


def test_under_autocast():
    given = sample()
    with torch.autocast("cpu", torch.bfloat16):
        got = monarch_matmul(*given[:3], bias=given.bias)
    low = [x.bfloat16() for x in given if x is not None]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, monarch_matmul(*low[:3], bias=low[3]))


def test_on_meta_there_are_shapes():
    x, first, second = (t.to("meta") for t in sample()[:3])
    out = monarch_matmul(x.view(37, 1, 21), first, second)
    assert (out.shape, out.device.type) == ((37, 1, 24), "meta")


REFUSED = [
    ({"input": torch.randn(4, 22)}, "input has 22 features and first, (r, j k, s), takes r s = 21"),
    ({"input": torch.randn(())}, "input must have shape (..., m)"),
    ({"first": torch.randn(3, 20)}, "first must have shape (r jk s)"),
    (
        {"second": torch.randn(5, 6, 15)},
        "do not fit together; expected (r, j k, s) and (k, p, r j)",
    ),
    ({"second": torch.randn(4, 6, 14)}, "first (3, 20, 7) and second (4, 6, 14) do not fit"),
    ({"first": torch.randn(3, 0, 7), "second": torch.randn(4, 6, 0)}, "no axis may be empty"),
    ({"bias": torch.randn(25)}, "bias has shape (25,) and second, (k, p, r j), makes 24 features"),
    ({"first": torch.randn(3, 20, 7).double()}, "first is torch.float64 and input torch.float32"),
    ({"input": torch.randn(4, 21).double()}, "impl='reference' also float64"),
    ({"input": torch.ones(4, 21, dtype=torch.int64)}, "input is torch.int64"),
    ({"second": torch.randn(4, 6, 15, device="meta")}, "second is on meta and input on cpu"),
    ({"impl": "dense"}, "impl must be 'fused' or 'reference'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_does_not_fit_is_refused_in_one_line(changes: dict[str, object], message: str):
    named = sample()._asdict() | changes
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        monarch_matmul(**named)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_sharded_operand_is_refused():
    class Sharded(torch.Tensor):
        def full_tensor(self) -> Tensor:
            return torch.Tensor(self)

    given = sample()
    with pytest.raises(NotImplementedError, match="first is sharded"):
        monarch_matmul(given.input, given.first.as_subclass(Sharded), given.second)


def test_factors_are_those_of_the_published_code():
    # square factors of 4 blocks: w1 (k, q, p), w2 (l, s, r), '(r l) -> l r' between them
    given = sample(tokens=9, runs=4, combs=4, rank=2, run=8, comb=8, dtype=torch.float64)
    hidden = torch.einsum("kqp,bkp->bkq", given.first, given.input.view(9, 4, 8))
    hidden = hidden.reshape(9, 8, 4).transpose(1, 2)
    expected = torch.einsum("lsr,blr->bsl", given.second, hidden).reshape(9, 32)
    got = monarch_matmul(*given[:3], impl="reference")
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
