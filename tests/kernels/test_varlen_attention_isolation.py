"""What must not change a bit: neighbours, order, strides, repetition, memory that was never set."""

import math
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apical.kernels.varlen_attention import _split, varlen_attention
from apical.kernels.varlen_attention._layout import PackedLayout

from . import varlen_attention_definition as spec
from .varlen_attention_definition import RAGGED, RAGGED_K, RAGGED_Q, Options

pytestmark = pytest.mark.usefixtures("one_thread")

SINKS = torch.tensor([1.0, -2.0, 0.0, 6.0])
SLOPES = torch.tensor([0.5, 0.05, 0.0, 1.0])
LAMBDA: Options = {"causal": True, "window_size": (9, 0), "global_tokens": 3}
OPTIONS: dict[str, Options] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (40, 3), "softcap": 2.0, "alibi_slopes": SLOPES, "sinks": SINKS},
    "lambda": LAMBDA,
    "re-weighted": {"causal": True, "weights": "softplus", "reweight": (3.0, 0.9)},
}


@pytest.fixture(params=spec.IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    return spec.force(request.param, monkeypatch)


def test_memory_that_was_never_set_is_nan():
    # what makes every test here one of scratch, too
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    assert torch.empty(3).isnan().all()


def rows_of(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], n: int) -> dict[str, slice]:
    """Return the rows of document n in every result."""
    q, k = (slice(sum(x[:n]), sum(x[: n + 1])) for x in (lengths_q, lengths_k))
    return {"out": q, "lse": q, "blind": q, "q.grad": q, "k.grad": k, "v.grad": k}


# what infects sums, and what only makes them wrong
@pytest.mark.parametrize("poison", [math.nan, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
# equal lengths take torch's kernel; unequal ones, with causal, the dense blocks
@pytest.mark.parametrize("more_keys", [0, 3])
def test_a_poisoned_neighbour(implementation, poison, dtype, option, more_keys):
    lengths_q = (67, 1, 70, 65)
    lengths_k = tuple(n + more_keys for n in lengths_q)
    tensors = spec.inputs(sum(lengths_q), sum(lengths_k), dtype=dtype)
    attend = spec.packed(lengths_q, lengths_k)
    expected = spec.run(attend, tensors, OPTIONS[option])
    third = rows_of(lengths_q, lengths_k, 2)
    places = {"q": "out", "k": "k.grad", "v": "v.grad", "grad": "out", "grad_lse": "out"}
    for name, place in places.items():
        tensors[name][third[place]] = poison
    actual = spec.run(attend, tensors, OPTIONS[option])
    assert not torch.equal(actual["out"][third["out"]], expected["out"][third["out"]])
    for name, rows in third.items():
        got, want = actual[name], expected[name]
        assert torch.equal(got[: rows.start], want[: rows.start]), name
        assert torch.equal(got[rows.stop :], want[rows.stop :]), name


@pytest.mark.parametrize("option", OPTIONS)
# 17 channels: documents begin at addresses that no vector is aligned to
@pytest.mark.parametrize(
    ("dtype", "dim"), [(torch.float32, 17), (torch.bfloat16, 16), (torch.float64, 17)], ids=str
)
def test_packed_is_each_document_alone(implementation, dtype, option, dim):
    lengths_q, lengths_k = (*RAGGED_Q, 330), (*RAGGED_K, 330)
    tensors = spec.inputs(sum(lengths_q), sum(lengths_k), dim=dim, dtype=dtype)
    together = spec.run(spec.packed(lengths_q, lengths_k), tensors, OPTIONS[option])
    for n, (len_q, len_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows = rows_of(lengths_q, lengths_k, n)
        own = {name: tensors[name][rows["out"]] for name in ("q", "grad", "grad_lse")}
        own |= {name: tensors[name][rows["k.grad"]] for name in ("k", "v")}
        alone = spec.run(spec.packed([len_q], [len_k]), own, OPTIONS[option])
        for name, place in rows.items():
            assert torch.equal(alone[name], together[name][place]), (n, name)


@pytest.mark.parametrize("option", OPTIONS)
def test_order_of_documents(implementation, option):
    order = [4, 2, 6, 0, 5, 1, 3]
    tensors = spec.inputs(sum(RAGGED), sum(RAGGED))
    rows = torch.arange(sum(RAGGED)).split(RAGGED)
    moved = torch.cat([rows[i] for i in order])
    lengths = [RAGGED[i] for i in order]
    expected = spec.run(spec.packed(RAGGED, RAGGED), tensors, OPTIONS[option])
    other = {name: x[moved] for name, x in tensors.items()}
    actual = spec.run(spec.packed(lengths, lengths), other, OPTIONS[option])
    for name in rows_of(RAGGED, RAGGED, 0):
        assert torch.equal(actual[name], expected[name][moved]), name


def test_repetition_on_two_threads(implementation):
    # short documents and many tasks, as races need
    lengths = (3, 17, 1, 40) * 15
    tensors = spec.inputs(sum(lengths), sum(lengths), heads=6)
    attend, options = spec.packed(lengths, lengths), {"causal": True, "sinks": torch.ones(6)}
    torch.set_num_threads(2)
    first = spec.run(attend, tensors, options)
    for _ in range(10):
        spec.assert_same_bits(spec.run(attend, tensors, options), first)


def head_major(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def channels_apart(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def slice_of_qkv(x: Tensor) -> Tensor:
    return torch.stack((torch.full_like(x, math.nan), x, x), dim=1)[:, 1]


def every_second_row(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 0)[::2]


def one_element_off(x: Tensor) -> Tensor:
    # rows that no vector is aligned to, with neighbours that hold NaN
    wide = torch.full((x.shape[0], x.shape[1], x.shape[2] + 3), math.nan, dtype=x.dtype)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


LAYOUTS = [head_major, channels_apart, slice_of_qkv, every_second_row, one_element_off]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", ["causal", "window", "re-weighted"])
def test_any_strides(implementation, layout, dtype, option):
    tensors = spec.inputs(sum(RAGGED_Q), sum(RAGGED_K), dtype=dtype)
    attend = spec.packed(RAGGED_Q, RAGGED_K)
    expected = spec.run(attend, tensors, OPTIONS[option])
    moved = {name: layout(x) if x.ndim == 3 else x for name, x in tensors.items()}
    assert not any(moved[name].is_contiguous() for name in ("q", "k", "v", "grad"))
    spec.assert_same_bits(spec.run(attend, moved, OPTIONS[option]), expected)


@pytest.mark.parametrize("option", ["causal", "window"])
def test_expanded_tensors(implementation, option):
    tensors = spec.inputs(sum(RAGGED), sum(RAGGED))
    attend = spec.packed(RAGGED, RAGGED)
    # as of a sum, and of keys that heads share
    tensors["grad"] = torch.randn(()).expand_as(tensors["grad"])
    tensors["grad_lse"] = torch.randn(()).expand_as(tensors["grad_lse"])
    for name in ("k", "v"):
        tensors[name] = tensors[name][:, :1].expand(-1, 2, -1)
    copies = {name: x.contiguous() for name, x in tensors.items()}
    expected = spec.run(attend, copies, OPTIONS[option])
    spec.assert_same_bits(spec.run(attend, tensors, OPTIONS[option]), expected)


@pytest.mark.parametrize("option", ["causal", "window"])
def test_one_row_for_all_tokens(implementation, option):
    tensors = spec.inputs(sum(RAGGED), sum(RAGGED))
    attend = spec.packed(RAGGED, RAGGED)
    for name in ("q", "k", "v", "grad"):
        tensors[name] = tensors[name][:1].expand(sum(RAGGED), -1, -1)
    copies = {name: x.contiguous() for name, x in tensors.items()}
    expected = spec.run(attend, copies, OPTIONS[option])
    # not bit for bit: a matrix of stride 0 takes another path through torch's own kernel
    torch.testing.assert_close(spec.run(attend, tensors, OPTIONS[option]), expected)


@pytest.mark.parametrize("name", [*spec.IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("option", ["causal", "lambda", "re-weighted", "sinks"])
def test_rows_without_keys_are_zero_whatever_they_hold(monkeypatch, name, option):
    impl = "reference" if name == "reference" else "fused"
    if impl == "fused":
        spec.force(name, monkeypatch)
    # two queries too many for causal; a document without keys; two queries, one key past the end
    lengths_q, lengths_k, options = (5, 2, 3), (3, 0, 4), {"causal": True, "sinks": SINKS}
    options = options if option == "sinks" else OPTIONS[option]
    dead = {"out": [0, 1, 5, 6, 10, 11], "k.grad": [7]}
    tensors, attend = spec.inputs(12, 8), spec.packed(lengths_q, lengths_k, impl=impl)
    expected = spec.run(attend, tensors, options)
    for name in ("q", "grad"):
        tensors[name][dead["out"]] = math.nan
    # lse of a row of a document is its sink, which has a gradient
    tensors["grad_lse"][[10, 11]] = math.nan
    for name in ("k", "v"):
        tensors[name][dead["k.grad"]] = math.nan
    actual = spec.run(attend, tensors, options)
    spec.assert_same_bits(actual, expected)
    for name, rows in {"out": "out", "q.grad": "out", "k.grad": "k.grad"}.items():
        assert torch.equal(actual[name][dead[rows]], torch.zeros_like(actual[name][dead[rows]]))
    blind = torch.zeros(12, 4)
    blind[[10, 11] if option == "sinks" else dead["out"]] = 1.0
    assert torch.equal(actual["blind"], blind)


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("option", OPTIONS)
# no tokens and no documents; only empty documents; tokens of no document; no keys at all
@pytest.mark.parametrize(
    ("tokens", "lengths_q", "lengths_k"),
    [((0, 0), (), ()), ((0, 0), (0, 0), (0, 0)), ((3, 3), (), ()), ((4, 0), (1, 3), (0, 0))],
)
def test_nothing_to_attend_to(impl, option, tokens, lengths_q, lengths_k):
    tensors, attend = spec.inputs(*tokens), spec.packed(lengths_q, lengths_k, impl=impl)
    actual = spec.run(attend, tensors, OPTIONS[option])
    for name in ("out", "q.grad", "k.grad", "v.grad"):
        assert torch.equal(actual[name], torch.zeros_like(actual[name])), name
    in_documents = option == "window" and sum(lengths_q) > 0
    assert torch.equal(actual["lse"], SINKS.expand(*tokens[:1], 4) * in_documents)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradient_of_one_input_alone(implementation, name):
    tensors, cu = spec.inputs(9, 9), spec.boundaries([4, 5])
    grads = []
    for others in (False, True):
        leaves = {x: tensors[x].clone().requires_grad_(others or x == name) for x in "qkv"}
        out = varlen_attention(leaves["q"], leaves["k"], leaves["v"], cu)
        grads += torch.autograd.grad(out.sum(), leaves[name])
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
    ends = [list(accumulate([n] * documents)) for n in (length, length + more_keys)]
    layout = PackedLayout(*(torch.tensor([0, *x]) for x in ends))
    tensors = spec.inputs(ends[0][-1], ends[1][-1], kv_heads=4)
    q, k, v, grad = (tensors[name] for name in ("q", "k", "v", "grad"))
    out, lse = _split.forward(q, k, v, layout, spec.PLAIN)
    with CountWholeBatches(q.numel()) as whole:
        _split.backward(grad, None, q, k, v, out, lse, layout, spec.PLAIN)
    assert whole.count == 3  # the gradients of q, k and v themselves
