"""What users of other kernels ran into, each under its issue's number.

Numbers without a name are of Dao-AILab/flash-attention.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from apical.kernels.varlen_attention import flash_attn_varlen_func, varlen_attention

from . import varlen_attention_definition as spec

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=spec.IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    return spec.force(request.param, monkeypatch)


def check(lengths_q, lengths_k, options=None, *, rtol=1e-4, **sizes):
    """Hold results and gradients of float32 against the definition."""
    tensors = spec.inputs(sum(lengths_q), sum(lengths_k), **sizes)
    actual = spec.run(spec.packed(lengths_q, lengths_k), tensors, options or {})
    exact = spec.run(spec.defined(lengths_q, lengths_k), tensors, options or {}, torch.float64)
    torch.testing.assert_close(actual, exact, rtol=rtol, atol=1e-5, check_dtype=False)


def test_1537_longest_of_one_token_beside_an_empty_document(implementation):
    check((1, 0, 1), (1, 0, 1))
    check((1, 0, 1), (5, 3, 2))


def test_1619_fewer_tokens_than_documents_with_shared_key_heads(implementation):
    check((0, 1, 0, 0, 1, 0), (0, 2, 0, 1, 0, 0), heads=8, kv_heads=2)


@pytest.mark.parametrize("causal", [False, True])
def test_2562_2568_documents_without_queries_at_256_channels(implementation, causal):
    check((0, 7, 0), (9, 11, 3), {"causal": causal}, dim=256)


def test_1773_documents_longer_than_max_seqlen():
    tensors, cu = spec.inputs(200, 200), spec.boundaries([150, 50])
    q, k, v = (tensors[name] for name in "qkv")
    # too short by far; nothing at all
    for longest in (16, 0):
        got = varlen_attention(q, k, v, cu, cu, longest, longest, causal=True)
        assert torch.equal(got, varlen_attention(q, k, v, cu, causal=True))


def test_1661_rows_after_the_last_boundary_are_zero(implementation):
    tensors, cu = spec.inputs(9, 9), spec.boundaries([2, 3])
    q, k, v = leaves = [tensors[name].requires_grad_() for name in "qkv"]
    out, lse = varlen_attention(q, k, v, cu, return_lse=True)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.equal(x[5:], torch.zeros_like(x[5:])) for x in (out, *grads))
    assert bool((lse[5:] == -math.inf).all())


# also #1311, #1042, #1500 and fla-org/flash-linear-attention#1080: offsets of 32 bits
@pytest.mark.parametrize("causal", [False, True])
def test_2611_elements_beyond_two_to_the_31(implementation, tmp_path, causal):
    # a sparse file: of its 9 GB a few pages are ever written
    tokens, stride = 3, 2**30
    size = (tokens - 1) * stride + 64

    def far(name: str, x: Tensor) -> Tensor:
        storage = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=x.dtype)
        return storage.as_strided(x.shape, (stride, x.shape[2], 1)).copy_(x)

    tensors = spec.inputs(tokens, tokens, heads=2, kv_heads=1, dim=8)
    attend, options = spec.packed([1, 2], [1, 2]), {"causal": causal}
    expected = spec.run(attend, tensors, options)
    moved = {name: far(name, x) if x.ndim == 3 else x for name, x in tensors.items()}
    spec.assert_same_bits(spec.run(attend, moved, options), expected)


def test_545_max_seqlen_as_a_tensor():
    tensors, cu = spec.inputs(9, 9), spec.boundaries([4, 5])
    q, k, v = (tensors[name] for name in "qkv")
    longest = torch.tensor(5)
    got = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)
    assert torch.equal(got, varlen_attention(q, k, v, cu, causal=True))


def test_huggingface_transformers_46693_max_seqlen_is_not_waited_for():
    tensors, cu = spec.inputs(9, 9), spec.boundaries([4, 5])
    q, k, v = (tensors[name] for name in "qkv")
    # a tensor without a value: whoever reads it fails
    longest = torch.empty((), device="meta", dtype=torch.int32)
    got = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest)
    assert torch.equal(got, varlen_attention(q, k, v, cu))


def test_nemo_automodel_3802_masks_beyond_46341_tokens(implementation):
    # 46,341 squared is the first square beyond 2 ** 31
    tokens, left = 46_400, 2
    q, k, v = (torch.randn(tokens, 1, 8) for _ in range(3))
    out = varlen_attention(q, k, v, spec.boundaries([tokens]), causal=True, window_size=(left, 0))
    shifted = [range(left, tokens), *(range(left - d, tokens - d) for d in range(1, left + 1))]
    rows = torch.tensor([list(x) for x in shifted])  # keys of the queries from the third on
    scores = (q[left:, 0] * k[rows, 0]).sum(-1) * 8**-0.5
    exact = (scores.softmax(0)[..., None] * v[rows, 0]).sum(0)
    torch.testing.assert_close(out[left:, 0], exact)


# lengths that are no multiple of 128, a score function and a mask
@pytest.mark.parametrize("length", [1, 127, 129, 200])
def test_pytorch_153799_gradients_are_not_nan(implementation, length):
    check((length, 3), (length, 3), {"causal": True, "softcap": 2.0})


# torch warns of what its compiler does to every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_pytorch_158212_compiled_gradients_are_those_of_eager():
    tensors, cu = spec.inputs(9, 9), spec.boundaries([4, 5])
    q, k, v = leaves = [tensors[name].requires_grad_() for name in "qkv"]
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    options: dict[str, Any] = {
        "window_size": (2, 1),
        "alibi_slopes": torch.linspace(0, 1, 4),
        "softcap": 2.0,
    }
    both = [
        torch.autograd.grad(attend(q, k, v, cu, **options), leaves, tensors["grad"])
        for attend in (compiled, varlen_attention)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


# its tests of the backward pass, by their names there
def test_bwd_overflow(implementation):
    lengths = (64, 33, 128)
    tensors = spec.inputs(sum(lengths), sum(lengths), dtype=torch.float16, dim=64)
    tensors["q"] = tensors["q"] * 5
    for causal in (False, True):
        results = spec.run(spec.packed(lengths, lengths), tensors, {"causal": causal})
        assert all(bool(x.isfinite().all()) for x in results.values())


def test_bwd_transpose(implementation):
    # the gradient as heads before tokens, as a transpose of the result leaves it
    tensors = spec.inputs(128, 128, heads=2, dim=64, dtype=torch.float16)
    attend = spec.packed([128], [128])
    expected = spec.run(attend, tensors, {"causal": True})
    tensors["grad"] = tensors["grad"].transpose(0, 1).contiguous().transpose(0, 1)
    spec.assert_same_bits(spec.run(attend, tensors, {"causal": True}), expected)


def test_bwd_varlen_overflow(implementation):
    # one key to a document: keys past its end, if they are read, are of other documents
    lengths_q, lengths_k = (76, 34, 146), (1, 1, 1)
    tensors = spec.inputs(sum(lengths_q), sum(lengths_k), dim=64, dtype=torch.float16)
    for name in ("q", "k"):
        tensors[name] = tensors[name] * 3
    results = spec.run(spec.packed(lengths_q, lengths_k), tensors, {})
    assert all(bool(x.isfinite().all()) for x in results.values())
    expanded = tensors["v"].repeat_interleave(torch.tensor(lengths_q), 0)
    assert torch.equal(results["out"], expanded.repeat_interleave(2, 1))


def test_flash_attention_4_padded_scratch_of_another_call(implementation):
    # right alone, wrong after a call whose scratch held NaN at other offsets
    options = {"causal": True}
    tensors, attend = spec.inputs(200, 200), spec.packed((130, 70), (130, 70))
    expected = spec.run(attend, tensors, options)
    for lengths in ((1, 199), (64, 65, 71), (200,)):
        other = {name: torch.full_like(x, math.nan) for name, x in tensors.items()}
        spec.run(spec.packed(lengths, lengths), other, options)
        spec.assert_same_bits(spec.run(attend, tensors, options), expected)
