"""The product's ops under torch's own checks, in compiled functions, and what it refuses."""

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from apical import Support, sparse_low_rank
from apical.kernels.sparse_low_rank import ops

from .sparse_low_rank_cases import (
    IMPLEMENTATIONS,
    SCALE,
    SUPPORTS,
    M,
    N,
    Operands,
    by_hand,
    force,
    fused,
    sample,
    with_grads,
)

# both forms of an index
FORMS = ("uniform", "grouped")
# all, none, and each without the others
WANTED = [[True] * 5, [False] * 5, *([i == k for i in range(5)] for k in range(5))]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    force(request.param, monkeypatch)
    return request.param


def detached(operands: Operands) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in operands if t is not None)


def layout_of(support: Support) -> list[int]:
    return [int(support.kind == "grouped"), N, M, *support.block]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FORMS)
def test_opcheck_forward(kind, dtype):
    support = SUPPORTS[kind](N, M)
    *tensors, bias = detached(sample(support, 9, dtype=dtype))
    for given in (bias, None):
        options = (given, list(support.index("cpu")), layout_of(support), SCALE)
        torch.library.opcheck(ops.forward, (*tensors, *options))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("kind", FORMS)
def test_opcheck_backward(kind, wanted):
    support = SUPPORTS[kind](N, M)
    tensors = detached(sample(support, 9))[:4]
    options = (list(support.index("cpu")), layout_of(support), SCALE, wanted)
    for hidden in (tensors[0] @ tensors[1].t(), torch.empty(0)):
        torch.library.opcheck(ops.backward, (torch.randn(9, N), *tensors, hidden, *options))


# twice in one graph, and another support in every call
COMPILED = """
import torch, apical
make = {
    "uniform": lambda seed: apical.Support("uniform", 70, 50, 0.1, seed=seed),
    "grouped": lambda seed: apical.Support("grouped", 70, 50, 0.3, seed=seed, block=(32, 8)),
    "explicit": lambda seed: apical.Support.explicit(torch.arange(seed, 900, 7)[:120], 70, 50),
}[KIND]
def product(x, a, b, values, bias, support):
    y = apical.sparse_low_rank(x, a, b, values, support, bias=bias, scale=0.5)
    return apical.sparse_low_rank(y.tanh()[:, :50], a, b, values, support)
fast = torch.compile(product, fullgraph=True, dynamic=True, backend="aot_eager")
for tokens in (5, 9):
    for seed in (0, 1):
        support = make(seed)
        shapes = ((tokens, 50), (6, 50), (70, 6), (support.stored,), (70,))
        leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
        got = fast(*leaves, support)
        expected = product(*leaves, support)
        torch.testing.assert_close(got, expected)
        upstream = torch.randn_like(got)
        grads = torch.autograd.grad(got, leaves, upstream)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, upstream))
print("ok")
"""


@pytest.mark.parametrize("kind", [*FORMS, "explicit"])
def test_compile_is_the_first_call_of_a_process(kind):
    code = COMPILED.replace("KIND", repr(kind))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "ok\n", run.stderr[-2000:]


# dynamo makes an instance of every torch.autograd.Function, which torch warns of
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_one_compiled_graph_serves_layers_of_one_shape_and_reads_each_one_s_index():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend=counter)
    operands, counts = sample(SUPPORTS["uniform"](N, M), 9), []
    for seed in range(4):
        support = Support("uniform", N, M, 0.06, seed=seed)
        support.index("cpu")
        torch.testing.assert_close(compiled(operands, support), fused(operands, support))
        counts.append(counter.frame_count)
    # whatever the first call counts for, the others compile nothing
    assert counts == counts[:1] * 4


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_under_autocast():
    support = SUPPORTS["uniform"](N, M)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    operands, upstream = sample(support, 20), torch.randn(20, N)
    with torch.autocast("cpu", torch.bfloat16):
        results = [
            with_grads(lambda o, call=call: call(o, support), operands, upstream)
            for call in (compiled, fused)
        ]
    assert results[0][0].dtype == torch.bfloat16
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("recompute", [True, False])
def test_hidden_is_saved_or_not(recompute, implementation):
    support, saved = SUPPORTS["uniform"](N, M), []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused(sample(support, 33, rank=11), support, recompute_hidden=recompute)
    assert ((33, 11) in saved) == (implementation == "native" and not recompute)
    # never the weight, nor the output
    assert all(shape not in saved for shape in ((N, M), (33, N)))


@pytest.mark.usefixtures("implementation")
def test_a_recomputed_hidden_has_the_same_bits():
    support, results = SUPPORTS["uniform"](N, M), []
    operands, upstream = sample(support, 33), torch.randn(33, N)
    for recompute in (True, False):
        call = lambda o, r=recompute: fused(o, support, recompute_hidden=r)  # noqa: E731
        results.append(with_grads(call, operands, upstream))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", FORMS)
def test_gradcheck_of_the_reference(kind):
    block = (3, 2) if kind == "grouped" else (0, 0)
    support = Support(kind, 7, 5, 0.4, block=block)
    leaves = [t.double().requires_grad_() for t in detached(sample(support, 4, rank=2))]

    def product(*tensors: Tensor) -> Tensor:
        x, a, b, values, bias = tensors
        return sparse_low_rank(x, a, b, values, support, bias=bias, scale=SCALE, impl="reference")

    assert torch.autograd.gradcheck(product, leaves)
    assert torch.autograd.gradgradcheck(product, leaves)
    torch.testing.assert_close(product(*leaves), by_hand(Operands(*leaves), support))


def test_the_fused_product_is_differentiable_once():
    support = SUPPORTS["uniform"](N, M)
    operands = sample(support, 3)
    (grad,) = torch.autograd.grad(
        fused(operands, support).square().sum(), operands.a, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_on_meta_there_are_shapes():
    support = SUPPORTS["grouped"](N, M)
    x, a, b, values, _ = (t.to("meta") for t in detached(sample(support, 2, 9)))
    output = sparse_low_rank(x, a, b, values, support)
    assert (output.shape, output.device.type) == ((2, 9, N), "meta")


def _changed(**changes: Any) -> dict[str, Any]:
    support = SUPPORTS["uniform"](N, M)
    x, a, b, values, bias = detached(sample(support, 4))
    named: dict[str, Any] = {
        "input": x,
        "a": a,
        "b": b,
        "values": values,
        "support": support,
        "bias": bias,
    }
    return named | changes


STORED = SUPPORTS["uniform"](N, M).stored
REFUSED = [
    ({"input": torch.randn(4, M + 1)}, "input has 53 features"),
    ({"input": torch.randn(())}, "input must have shape (..., m)"),
    ({"a": torch.randn(7)}, "a must have shape (R m)"),
    ({"b": torch.randn(N, 6)}, "b has R=6"),
    ({"a": torch.randn(0, M), "b": torch.randn(N, 0)}, "rank R=0"),
    ({"bias": torch.randn(N + 1)}, "bias has n=301"),
    ({"values": torch.randn(STORED + 1)}, f"values has {STORED + 1} entries"),
    ({"values": torch.randn(STORED, 1)}, "values must have shape (S)"),
    ({"support": Support("uniform", M, N, 0.06)}, "support is for 52 x 300"),
    ({"a": torch.randn(7, M).double()}, "a is torch.float64 and input torch.float32"),
    ({"values": torch.randn(STORED).bfloat16()}, "values is torch.bfloat16"),
    ({"input": torch.ones(4, M, dtype=torch.int64)}, "input is torch.int64"),
    ({"input": torch.randn(4, M).double()}, "impl='reference' also float64"),
    ({"b": torch.randn(N, 7, device="meta")}, "b on meta"),
    ({"scale": float("nan")}, "scale must be a finite number"),
    ({"impl": "dense"}, "impl must be 'fused' or 'reference'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_does_not_fit_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        sparse_low_rank(**_changed(**changes))
    assert "\n" not in str(error.value)


def test_a_sharded_operand_is_refused():
    class Sharded(torch.Tensor):
        def full_tensor(self) -> Tensor:
            return torch.Tensor(self)

    with pytest.raises(NotImplementedError, match="a is sharded"):
        sparse_low_rank(**_changed(a=torch.randn(7, M).as_subclass(Sharded)))
