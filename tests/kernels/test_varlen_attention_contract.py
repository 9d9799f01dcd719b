"""The contract of packed attention: its registration, compilation, memory, hints and refusals."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apical.kernels.varlen_attention import _reference, _split, ops, varlen_attention

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


@pytest.mark.parametrize("causal", [False, True])
def test_lse_is_the_log_of_the_denominators(causal):
    # rows that see no key, torch's kernel, and the dense blocks
    q, k, v = heads(14, 4), heads(13, 2), heads(13, 2)
    layout = boundaries(5, 7, 10, 13), boundaries(3, 3, 6, 12), causal, 0.25
    _, lse = ops.forward(q, k, v, *layout)
    _, exact = _reference.forward(q.double(), k.double(), v.double(), *layout)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-6)


def test_gradient_of_one_input_alone():
    q, k, v, cu = heads(9, 4), heads(9, 2), heads(9, 2), boundaries(4, 9)
    grads = []
    for others in (False, True):
        leaves = [x.clone().requires_grad_(others) for x in (q, k, v)]
        out = varlen_attention(leaves[0], leaves[1].requires_grad_(), leaves[2], cu)
        grads += torch.autograd.grad(out.sum(), leaves[1])
    assert torch.equal(*grads)


class CountWholeBatches(TorchDispatchMode):
    """Counts the tensors at least as large as the batch that operations return."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel = numel
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returned = result if isinstance(result, tuple | list) else (result,)
        self.count += sum(x.numel() >= self.numel for x in returned if isinstance(x, Tensor))
        return result


# equal lengths take torch's kernel; unequal ones, with causal, the dense blocks
@pytest.mark.parametrize("more_keys", [0, 1])
def test_backward_makes_no_gradient_as_long_as_the_batch_per_document(more_keys):
    documents, length = 16, 4
    ends = range(1, documents + 1)
    q, grad = heads(documents * length, 2), heads(documents * length, 2)
    k, v = (heads(documents * (length + more_keys), 2) for _ in range(2))
    cu_q, cu_k = (boundaries(*(n * i for i in ends)) for n in (length, length + more_keys))
    out, lse = _split.forward(q, k, v, cu_q, cu_k, True, 1.0)
    with CountWholeBatches(q.numel()) as whole:
        _split.backward(grad, q, k, v, out, lse, cu_q, cu_k, True, 1.0)
    assert whole.count == 3  # the gradients of q, k and v themselves


# all of torch's checks but that of autograd's registration: the gradient is in autograd.Function
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("shared", [True, False], ids=["one-cu", "two-cu"])
# the statistics are float64 for float64 alone
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck(shared, dtype):
    q, k, v, grad = (heads(9, n, dtype=dtype) for n in (4, 2, 2, 4))
    cu = boundaries(4, 4, 9)
    layout = cu, None if shared else cu.clone(), True, 0.25
    torch.library.opcheck(ops.forward, (q, k, v, *layout), test_utils=CHECKS)
    out, lse = ops.forward(q, k, v, *layout)
    torch.library.opcheck(ops.backward, (grad, q, k, v, out, lse, *layout), test_utils=CHECKS)


COMPILED = """
import torch
from apical.kernels.varlen_attention import varlen_attention

compiled = torch.compile(varlen_attention, fullgraph=True, dynamic=True, backend="aot_eager")
for lengths in ((3, 0, 4), (5, 6)):
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q = torch.randn(int(cu[-1]), 4, 8, requires_grad=True)
    k = torch.randn(int(cu[-1]), 2, 8)
    # one tensor in two places is what callers pass: keys as values, one set of boundaries
    for other in (None, cu, cu.clone()):
        grads = []
        for attend in (compiled, varlen_attention):
            out = attend(q, k, k, cu, other, 6, 6, causal=True)
            grads += [out.detach(), *torch.autograd.grad(out.square().sum(), q)]
        assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[3])
print("ok")
"""


def test_compiles_as_the_first_call_of_a_process():
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr[-2000:]


Q, K, CU = heads(5, 4), heads(5, 2), boundaries(2, 5)

REFUSED = {
    "rank": ((Q[0], K, K, CU), r"q must have shape \(T H D\), got \(4, 8\)"),
    "head size of k": ((Q, K[..., :7], K, CU), r"k has D=7, .* D=8"),
    "length of v": ((Q, K, heads(6, 2), CU), r"v has S=6, .* S=5"),
    "head size of v": ((Q, K, heads(5, 2, 9), CU), r"v has D=9, .* D=8"),
    "heads": ((Q, heads(5, 3), heads(5, 3), CU), r"H=4 .* K=3 .* multiple of K"),
    "no heads": ((Q[:, :0], K, K, CU), r"H=0 .* none may be 0"),
    "no channels": ((Q[..., :0], K[..., :0], K[..., :0], CU), r"D=0"),
    "dtypes": ((Q, K.half(), K, CU), r"share a dtype, got torch.float32, torch.float16"),
    "integers": ((Q.int(), K.int(), K.int(), CU), r"q has dtype torch.int32; expected"),
    "devices": ((Q, K.to("meta"), K, CU), r"on one device, got cpu, meta and cpu"),
    "float boundaries": ((Q, K, K, CU.float()), r"cu_seqlens_q has dtype torch.float32"),
    "boundaries elsewhere": ((Q, K, K, CU, CU.to("meta")), r"cu_seqlens_k is on meta"),
    "rank of boundaries": ((Q, K, K, CU[None]), r"cu_seqlens_q must have shape \(N\+1\)"),
    "other count": ((Q, K, K, CU, CU[:2]), r"cu_seqlens_k has N\+1=2, .* N\+1=3"),
    "no boundaries": ((Q, K, K, CU[:0]), r"cu_seqlens_q must start with 0, got \[\]"),
    "late start": ((Q, K, K, CU[1:]), r"cu_seqlens_q must start with 0, got \[2\]"),
    "lengths": ((Q, K, K, boundaries(3, 2)), r"cu_seqlens_q .* decrease, got 3 then 2 .* 1"),
    "end of q": ((Q[:4], K, K, CU), r"cu_seqlens_q ends at 5, but there are 4 tokens"),
    "end of k": ((Q, K[:4], K[:4], CU), r"cu_seqlens_q, which bounds k too, ends at 5, .* 4 tok"),
    "own end of k": ((Q, K[:4], K[:4], CU, CU.clone()), r"cu_seqlens_k ends at 5, .* 4 tokens"),
}


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_named_in_one_line(case, impl):
    args, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        varlen_attention(*args, impl=impl)
    assert "\n" not in str(error.value)


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


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"impl must be 'fused' or 'reference', got 'fast'"):
        varlen_attention(Q, K, K, CU, impl="fast")
