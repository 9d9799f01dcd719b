"""The contract of packed attention: its registration, compilation, signatures, refusals."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from apical.kernels.varlen_attention import (
    PackedLayout,
    ops,
    varlen_attention,
)
from apical.kernels.varlen_attention._rules import Rules

from . import varlen_attention_definition as spec

pytestmark = pytest.mark.usefixtures("one_thread")


def boundaries(*ends: int) -> Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32)


def heads(tokens: int, count: int, dim: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, count, dim).to(dtype)


def test_hints_and_integer_type_of_the_boundaries_change_nothing():
    q, k, v = heads(9, 4), heads(9, 2), heads(9, 2)
    cu = boundaries(3, 3, 9)
    expected = varlen_attention(q, k, v, cu)
    assert torch.equal(varlen_attention(q, k, v, cu.long(), cu), expected)
    assert torch.equal(varlen_attention(q, k, v, cu, cu, 6, 6), expected)
    # too short and far too long
    assert torch.equal(varlen_attention(q, k, v, cu, None, 1, 10**9), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_types_of_results(impl, dtype):
    q, k, v = heads(9, 4, dtype=dtype), heads(9, 2, dtype=dtype), heads(9, 2, 5, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for options in ({}, {"causal": True, "window_size": (1, 0), "global_tokens": 1}):
        out, lse = varlen_attention(
            q, k, v, boundaries(3, 7), impl=impl, return_lse=True, **options
        )
        assert (out.shape, out.dtype) == ((9, 4, 5), dtype)
        assert (lse.shape, lse.dtype) == ((9, 4), wide)


RULES: dict[str, dict[str, Any]] = {
    "causal": {"right": 0},
    "window-softcap-sinks": {
        "left": 3, "right": 1, "transform": "softcap", "a": 2.0, "sinks": torch.randn(4),
    },
    "alibi-dropout": {
        "alibi_slopes": torch.rand(3, 4), "seed": torch.tensor([7]), "dropout": 0.5,
    },
    "global": {"right": -2, "limit": 2},
    "softplus": {"transform": "softplus"},
    "power": {"right": 0, "transform": "power", "a": 3.0, "b": 0.9, "gain": torch.rand(9, 4)},
}  # fmt: skip
# all of torch's checks but that of autograd's registration: the gradient is in autograd.Function
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


# the statistics are float64 for float64 alone; one tensor of boundaries, or two; values as large as
# keys, or none, as in the first stage of re-weighted softplus
@pytest.mark.parametrize(
    ("case", "dtype", "shared", "values"),
    [
        *((case, torch.bfloat16, True, 8) for case in RULES),
        ("window-softcap-sinks", torch.float64, False, 8),
        ("power", torch.float64, False, 8),
        ("softplus", torch.float64, True, 0),
    ],
    ids=str,
)
def test_opcheck(case, dtype, shared, values):
    q, k, v, grad = (
        heads(9, count, dim, dtype)
        for count, dim in ((4, 8), (2, 8), (2, values), (4, values))
    )  # fmt: skip
    cu, rules = boundaries(4, 4, 9), spec.PLAIN._replace(scale=0.25)._replace(**RULES[case])
    layout = cu, None if shared else cu.clone()
    torch.library.opcheck(ops.forward, (q, k, v, *layout, *rules), test_utils=CHECKS)
    out, lse = ops.forward(q, k, v, *layout, *rules)
    for grad_lse in (None, torch.randn_like(lse)):
        arguments = (grad, grad_lse, q, k, v, out, lse, *layout, *rules)
        torch.library.opcheck(ops.backward, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("op", [ops.forward, ops.backward], ids=["forward", "backward"])
def test_schema_ends_with_the_rules(op):
    names = [argument.name for argument in op._schema.arguments]
    assert tuple(names[-len(Rules._fields) :]) == Rules._fields


def test_fake_tensors_have_the_shapes_and_strides_of_real_ones():
    cu, sinks = boundaries(4, 9), torch.randn(4)

    def run(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, sinks: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        query, key, value = leaves
        out, lse = varlen_attention(query, key, value, cu, sinks=sinks, return_lse=True)
        return [out, lse, *torch.autograd.grad(out.sum() + lse[:9].sum(), leaves)]

    # heads before tokens, whose gradients have another order than they have
    real = heads(10, 4), heads(10, 2), heads(2, 10, 6).transpose(0, 1)
    want = run(*real, cu, sinks)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (*real, cu, sinks)]
        got = run(*fakes)
    for fake, true in zip(got, want, strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (true.shape, true.stride(), true.dtype)


COMPILED = """
import torch
from apical.kernels.varlen_attention import PackedLayout, varlen_attention

H = 4
sinks = torch.randn(H, requires_grad=True)
options = {
    "causal": {"causal": True},
    "window": {"window_size": (3, 1), "softcap": 2.0, "alibi_slopes": torch.rand(H)},
    "sinks": {"sinks": sinks},
    "dropout": {"dropout_p": 0.5},
    "global": {"causal": True, "window_size": (1, 0), "global_tokens": 1},
    "re-weighted": {"causal": True, "weights": "softplus", "reweight": (3.0, 1.0)},
}


def compare(compiled, name, lengths, layouts):
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q = torch.randn(int(cu[-1]), H, 8, requires_grad=True)
    k = torch.randn(int(cu[-1]), 2, 8, requires_grad=True)
    # one tensor in two places is what callers pass: keys as values, one set of boundaries
    every = ((cu, cu), (PackedLayout(cu),), (cu, cu.clone()))
    leaves = (q, k, sinks) if name == "sinks" else (q, k)
    for given in every[:layouts]:
        both = []
        for attend in (compiled, varlen_attention):
            torch.manual_seed(5)
            out, lse = attend(q, k, k, *given, **options[name], return_lse=True)
            grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
            both.append([out, lse, *grads])
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True)), (name, given)


for name in NAMES:
    torch._dynamo.reset()
    compiled = torch.compile(varlen_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((3, 0, 4), (5, 6)):
        compare(compiled, name, lengths, layouts=3 if name == "causal" else 1)
print("ok")
"""


# in the first call of a process nothing has been imported, registered or cached before
@pytest.mark.parametrize(
    "names", [("causal", "window", "sinks"), ("dropout", "global", "re-weighted")], ids="-".join
)
def test_compiles_as_the_first_call_of_a_process(names):
    code = COMPILED.replace("NAMES", repr(names))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr[-2000:]


# torch warns of what its compiler does to every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("as_layout", [False, True], ids=["boundaries", "layout"])
def test_new_batches_compile_nothing_anew(as_layout):
    compiled = torch.compile(varlen_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for n in range(6):
        layout = PackedLayout.from_lengths([n + 2, 0, *[1] * n, n + 3])
        q = torch.randn(layout.bounds_q[-1], 3, 8, requires_grad=True)
        compiled(
            q, q, q, layout if as_layout else layout.cu_seqlens_q, causal=True
        ).sum().backward()
    # one for the first sizes, and at most one where two of them were equal by chance
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


# as above: a second number of heads makes it a symbol, beside a tensor of a known one
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["alibi_slopes", "sinks", "q_global"])
def test_a_varying_number_of_heads_compiles(name):
    torch._dynamo.reset()
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    cu, options = boundaries(4, 9), {"causal": True, "window_size": (1, 0), "global_tokens": 1}
    compiled(heads(9, 3), heads(9, 3), heads(9, 3), cu, **options)
    q, per_head = heads(9, 4), heads(9, 4) if name == "q_global" else torch.rand(4)
    options[name] = per_head
    assert torch.equal(compiled(q, q, q, cu, **options), varlen_attention(q, q, q, cu, **options))


@pytest.mark.parametrize("causal", [False, True])  # torch's kernel, and dense blocks
def test_autocast_changes_nothing_inside(causal):
    cu_q, cu_k = boundaries(2, 5), boundaries(5, 6)
    q, k, v = leaves = [torch.randn(n, 2, 8, requires_grad=True) for n in (5, 6, 6)]
    expected = varlen_attention(q, k, v, cu_q, cu_k, causal=causal)
    with torch.autocast("cpu", torch.bfloat16):
        got = varlen_attention(q, k, v, cu_q, cu_k, causal=causal)
        grads = torch.autograd.grad(got.sum(), leaves)
    assert torch.equal(got, expected)
    for grad, want in zip(grads, torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert torch.equal(grad, want)
