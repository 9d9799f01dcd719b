"""Packed attention against its definition: one dense softmax under a mask over the whole batch."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from apical.kernels.varlen_attention import _cpu, _split, varlen_attention

pytestmark = pytest.mark.usefixtures("one_thread")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]

HEADS = [
    pytest.param(4, 4, id="mha"),
    pytest.param(4, 2, id="gqa"),
    pytest.param(3, 1, id="mqa-odd"),
]
CAUSAL = [pytest.param(False, id="bidirectional"), pytest.param(True, id="causal")]
IMPL = ["fused", "reference"]
# one token, around the usual block of 128, and empty documents first, in the middle, last
RAGGED = (0, 1, 127, 0, 128, 129, 0)
# fewer, equal and more keys than queries; none on either side; several blocks of rows
RAGGED_Q = (0, 5, 9, 4, 0, 1, 300, 130)
RAGGED_K = (3, 9, 5, 0, 0, 200, 129, 261)


def boundaries(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def inputs(
    tokens_q: int,
    tokens_k: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Four:
    """Return q, k, v and the gradient of the result."""
    shapes = ((tokens_q, heads), (tokens_k, kv_heads), (tokens_k, kv_heads), (tokens_q, heads))
    q, k, v, grad = (torch.randn(*shape, dim).to(dtype) for shape in shapes)
    return q, k, v, grad


def packed(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    *,
    causal: bool,
    scale: float | None = None,
    impl: str = "fused",
) -> Attention:
    """Return what is tested."""
    cu_q, cu_k = boundaries(lengths_q), boundaries(lengths_k)
    return lambda q, k, v: varlen_attention(
        q, k, v, cu_q, cu_k, causal=causal, softmax_scale=scale, impl=impl
    )


def visible(
    lengths_q: Sequence[int], lengths_k: Sequence[int], *, tokens: tuple[int, int], causal: bool
) -> Tensor:
    seen = torch.zeros(tokens, dtype=torch.bool)
    row = column = 0
    for len_q, len_k in zip(lengths_q, lengths_k, strict=True):
        square = torch.ones(len_q, len_k, dtype=torch.bool)
        square = square.tril(len_k - len_q) if causal else square
        seen[row : row + len_q, column : column + len_k] = square
        row, column = row + len_q, column + len_k
    return seen


def definition(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    *,
    causal: bool,
    scale: float | None = None,
) -> Attention:
    """Return attention as one dense softmax."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = visible(lengths_q, lengths_k, tokens=(q.shape[0], k.shape[0]), causal=causal)
        alive = seen.any(1, keepdim=True)
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = (q.transpose(0, 1) @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        p = scores.masked_fill(~seen & alive, -math.inf).softmax(-1).masked_fill(~alive, 0.0)
        return (p @ v).transpose(0, 1)

    return attend


def plain(lengths_q: Sequence[int], lengths_k: Sequence[int], *, causal: bool) -> Attention:
    """Return what plain PyTorch offers: its own attention, with the mask of the whole batch."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = visible(lengths_q, lengths_k, tokens=(q.shape[0], k.shape[0]), causal=causal)
        alive = seen.any(1, keepdim=True)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen | ~alive, enable_gqa=True
        )
        return out[0].masked_fill(~alive, 0.0).transpose(0, 1)

    return attend


def with_gradients(
    attend: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    dtype: torch.dtype | None = None,
) -> Four:
    """Return the result and the gradients of q, k and v."""
    q, k, v = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    grad_q, grad_k, grad_v = torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))
    return out.detach(), grad_q, grad_k, grad_v


def check_all(
    check_error: Callable[[Tensor, Tensor, Tensor, str], None],
    tensors: Four,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    *,
    causal: bool,
    impl: str = "fused",
) -> None:
    actual = with_gradients(packed(lengths_q, lengths_k, causal=causal, impl=impl), *tensors)
    truth = definition(lengths_q, lengths_k, causal=causal)
    exact = with_gradients(truth, *tensors, dtype=torch.float64)
    same = with_gradients(plain(lengths_q, lengths_k, causal=causal), *tensors)
    names = ("out", "q.grad", "k.grad", "v.grad")
    for values in zip(actual, exact, same, names, strict=True):
        check_error(*values)


def assert_same_bits(actual: Four, expected: Four) -> None:
    for ours, same in zip(actual, expected, strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
# one vector register; the common size; not a power of two
@pytest.mark.parametrize("dim", [16, 64, 80])
def test_result_and_gradients_against_float64(check_error, dtype, causal, heads, kv_heads, dim):
    tokens = sum(RAGGED)
    tensors = inputs(tokens, tokens, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    check_all(check_error, tensors, RAGGED, RAGGED, causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_queries_and_keys_of_different_lengths(check_error, dtype, causal, heads, kv_heads):
    tensors = inputs(sum(RAGGED_Q), sum(RAGGED_K), heads=heads, kv_heads=kv_heads, dtype=dtype)
    check_all(check_error, tensors, RAGGED_Q, RAGGED_K, causal=causal)


@pytest.mark.parametrize("causal", CAUSAL)
# both sides of the length from which bfloat16 stays bfloat16 in the backward pass, and far above
@pytest.mark.parametrize("length", [319, 320, 700])
# as on processors with and without matrix units for bfloat16
@pytest.mark.parametrize("native", [True, False], ids=["native", "upcast"])
def test_long_bfloat16_documents(check_error, monkeypatch, causal, length, native):
    monkeypatch.setattr(_cpu, "takes", lambda _: False)
    monkeypatch.setattr(_split, "_is_native", lambda dtype: native and dtype == torch.bfloat16)
    tensors = inputs(length + 1, length + 1, dim=64, dtype=torch.bfloat16)
    check_all(check_error, tensors, (length, 1), (length, 1), causal=causal)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_without_the_library(check_error, monkeypatch, causal, heads, kv_heads):
    monkeypatch.setattr(_cpu, "takes", lambda _: False)
    tensors = inputs(sum(RAGGED_Q), sum(RAGGED_K), heads=heads, kv_heads=kv_heads)
    check_all(check_error, tensors, RAGGED_Q, RAGGED_K, causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_dense_blocks_of_other_devices(check_error, monkeypatch, dtype, causal, heads, kv_heads):
    monkeypatch.setattr(_cpu, "takes", lambda _: False)
    monkeypatch.setattr(_split, "_fused_fits", lambda *_, **__: False)
    tensors = inputs(sum(RAGGED_Q), sum(RAGGED_K), heads=heads, kv_heads=kv_heads, dtype=dtype)
    check_all(check_error, tensors, RAGGED_Q, RAGGED_K, causal=causal)


def test_two_threads(check_error):
    tensors = inputs(sum(RAGGED_Q), sum(RAGGED_K))
    torch.set_num_threads(2)
    check_all(check_error, tensors, RAGGED_Q, RAGGED_K, causal=True)


def test_large_scores_do_not_overflow(check_error):
    q, k, v, grad = inputs(sum(RAGGED), sum(RAGGED), dtype=torch.float16)
    check_all(check_error, (30 * q, 30 * k, v, grad), RAGGED, RAGGED, causal=True)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("impl", IMPL)
# the default; neither the default nor 1; the mean of the values; the least likely key first
@pytest.mark.parametrize("scale", [None, 0.3, 0.0, -1.0])
def test_float64_equals_the_definition(causal, impl, scale):
    tensors = inputs(sum(RAGGED_Q), sum(RAGGED_K), dtype=torch.float64)
    ours = packed(RAGGED_Q, RAGGED_K, causal=causal, scale=scale, impl=impl)
    truth = definition(RAGGED_Q, RAGGED_K, causal=causal, scale=scale)
    torch.testing.assert_close(
        with_gradients(ours, *tensors), with_gradients(truth, *tensors), rtol=1e-12, atol=1e-12
    )


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True, database=None)
@hypothesis.given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6),
    tail=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (5, 1)]),
    dim=st.integers(1, 19),
    causal=st.booleans(),
    equal=st.booleans(),
)
def test_any_layout_of_documents(lengths, tail, heads, dim, causal, equal):
    lengths_q = [len_q for len_q, _ in lengths]
    lengths_k = lengths_q if equal else [len_k for _, len_k in lengths]
    tokens_q, tokens_k = sum(lengths_q) + tail[0], sum(lengths_k) + tail[1]
    tensors = inputs(
        tokens_q, tokens_k, heads=heads[0], kv_heads=heads[1], dim=dim, dtype=torch.float64
    )
    actual = with_gradients(packed(lengths_q, lengths_k, causal=causal), *tensors)
    exact = with_gradients(definition(lengths_q, lengths_k, causal=causal), *tensors)
    torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", IMPL)
def test_rows_without_keys_are_zero_whatever_they_hold(impl):
    # two queries too many for causal; a document without keys; two queries, one key past the end
    lengths_q, lengths_k = (5, 2, 3), (3, 0, 4)
    q, k, v, grad = inputs(12, 8)
    dead = [0, 1, 5, 6, 10, 11]
    for x, rows in ((q, dead), (grad, dead), (k, [7]), (v, [7])):
        x[rows] = math.nan
    ours = packed(lengths_q, lengths_k, causal=True, impl=impl)
    actual = with_gradients(ours, q, k, v, grad)
    for x, rows in zip(actual, (dead, dead, [7], [7]), strict=True):
        assert torch.equal(x[rows], torch.zeros_like(x[rows]))
    # and the other rows are what they are without them
    q, k, v, grad = (x.nan_to_num() for x in (q, k, v, grad))
    exact = with_gradients(definition(lengths_q, lengths_k, causal=True), q, k, v, grad)
    torch.testing.assert_close(actual, exact)


@pytest.mark.parametrize("impl", IMPL)
# no tokens and no documents; only empty documents; tokens of no document
@pytest.mark.parametrize(("tokens", "lengths"), [(0, ()), (0, (0, 0)), (3, ())])
def test_nothing_to_attend_to(impl, tokens, lengths):
    q, k, v, grad = inputs(tokens, tokens)
    out = packed(lengths, lengths, causal=False, impl=impl)(q.requires_grad_(), k, v)
    (grad_q,) = torch.autograd.grad(out, q, grad)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(grad_q, torch.zeros_like(q))


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", CAUSAL)
# equal lengths take torch's kernel; unequal ones, with causal, the dense blocks
@pytest.mark.parametrize("more_keys", [0, 3])
def test_a_poisoned_neighbour_changes_no_bit(poison, dtype, causal, more_keys):
    lengths_q = (127, 1, 130, 129)
    lengths_k = tuple(n + more_keys for n in lengths_q)
    q, k, v, grad = inputs(sum(lengths_q), sum(lengths_k), dtype=dtype)
    attend = packed(lengths_q, lengths_k, causal=causal)
    expected = with_gradients(attend, q, k, v, grad)
    third_q, third_k = (slice(sum(n[:2]), sum(n[:3])) for n in (lengths_q, lengths_k))
    for x, third in ((q, third_q), (k, third_k), (v, third_k), (grad, third_q)):
        x[third] = poison
    actual = with_gradients(attend, q, k, v, grad)
    for x, y, third in zip(actual, expected, (third_q, third_q, third_k, third_k), strict=True):
        assert not torch.equal(x[third], y[third])
        assert torch.equal(x[: third.start], y[: third.start])
        assert torch.equal(x[third.stop :], y[third.stop :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("causal", CAUSAL)
# 17 channels: documents begin at addresses that no vector is aligned to
@pytest.mark.parametrize("dim", [16, 17])
def test_packed_equals_each_document_alone_bit_for_bit(dtype, causal, dim):
    lengths_q, lengths_k = (*RAGGED_Q, 330), (*RAGGED_K, 330)
    q, k, v, grad = inputs(sum(lengths_q), sum(lengths_k), dim=dim, dtype=dtype)
    together = with_gradients(packed(lengths_q, lengths_k, causal=causal), q, k, v, grad)
    by_q, by_k = tuple(lengths_q), tuple(lengths_k)
    documents = zip(
        *(x.split(by) for x, by in ((q, by_q), (k, by_k), (v, by_k), (grad, by_q))), strict=True
    )
    expected = zip(
        *(x.split(by) for x, by in zip(together, (by_q, by_q, by_k, by_k), strict=True)),
        strict=True,
    )
    for one, parts in zip(documents, expected, strict=True):
        attend = packed((len(one[0]),), (len(one[1]),), causal=causal)
        assert_same_bits(with_gradients(attend, *(x.clone() for x in one)), parts)


def test_order_of_documents_does_not_matter():
    order = [4, 2, 6, 0, 5, 1, 3]
    q, k, v, grad = inputs(sum(RAGGED), sum(RAGGED))
    moved_lengths = [RAGGED[i] for i in order]
    rows = torch.arange(sum(RAGGED)).split(RAGGED)
    moved = torch.cat([rows[i] for i in order])
    expected = with_gradients(packed(RAGGED, RAGGED, causal=True), q, k, v, grad)
    attend = packed(moved_lengths, moved_lengths, causal=True)
    actual = with_gradients(attend, q[moved], k[moved], v[moved], grad[moved])
    for ours, same in zip(actual, expected, strict=True):
        assert torch.equal(ours, same[moved])


def head_major(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def channels_apart(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def slice_of_qkv(x: Tensor) -> Tensor:
    return torch.stack((torch.full_like(x, math.nan), x, x), dim=1)[:, 1]


def every_second_row(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 0)[::2]


@pytest.mark.parametrize("layout", [head_major, channels_apart, slice_of_qkv, every_second_row])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", CAUSAL)
def test_any_strides_give_the_same_bits(layout, dtype, causal):
    q, k, v, grad = inputs(sum(RAGGED_Q), sum(RAGGED_K), dtype=dtype)
    attend = packed(RAGGED_Q, RAGGED_K, causal=causal)
    expected = with_gradients(attend, q, k, v, grad)
    moved = layout(q), layout(k), layout(v), layout(grad)
    assert not any(x.is_contiguous() for x in moved)
    assert_same_bits(with_gradients(attend, *moved), expected)


def test_expanded_gradient():
    q, k, v, _ = inputs(sum(RAGGED), sum(RAGGED))
    attend = packed(RAGGED, RAGGED, causal=True)
    grad = torch.randn(()).expand_as(q)
    expected = with_gradients(attend, q, k, v, grad.contiguous())
    assert_same_bits(with_gradients(attend, q, k, v, grad), expected)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("impl", IMPL)
def test_gradcheck(causal, impl):
    lengths_q, lengths_k = (2, 0, 3, 1), (2, 1, 1, 3)
    q, k, v, _ = inputs(6, 7, heads=2, kv_heads=1, dim=2, dtype=torch.float64)
    leaves = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    attend = packed(lengths_q, lengths_k, causal=causal, impl=impl)
    assert torch.autograd.gradcheck(attend, leaves)
    if impl == "reference":
        assert torch.autograd.gradgradcheck(attend, leaves)


def test_fused_refuses_a_second_derivative():
    q, k, v, _ = inputs(4, 4)
    out = packed((4,), (4,), causal=False)(q.requires_grad_(), k, v)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
