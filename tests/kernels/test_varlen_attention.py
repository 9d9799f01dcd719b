"""Packed attention against its definition in float64, for every option and implementation."""

import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from apical.kernels.varlen_attention import _split, varlen_attention

from . import varlen_attention_definition as spec
from .varlen_attention_definition import RAGGED, RAGGED_K, RAGGED_Q, Options

pytestmark = pytest.mark.usefixtures("one_thread")

SLOPES = torch.tensor([0.5, 0.05, 0.0, 1.0])
SINKS = torch.tensor([1.0, -2.0, 0.0, 6.0])
SEED = torch.tensor([2**40 + 7])
DROPOUT: Options = {"dropout_p": 0.3, "dropout_seed": SEED}

OPTIONS: dict[str, Options] = {
    "full": {},
    "causal": {"causal": True},
    # shorter than a block of rows; a document is longer and shorter
    "window-left": {"causal": True, "window_size": (7, 0)},
    "window-left-long": {"causal": True, "window_size": (100, -1)},
    "window-right": {"window_size": (-1, 3)},
    "window-both": {"window_size": (5, 40)},
    "window-narrow": {"window_size": (1, 0)},
    "scale": {"causal": True, "softmax_scale": 0.7},
    # the mean of the values; the least likely key first, which torch's kernel cannot mask
    "scale-zero": {"softmax_scale": 0.0},
    "scale-negative": {"causal": True, "softmax_scale": -0.4},
    "softcap": {"softcap": 0.8},
    "softcap-causal": {"causal": True, "softcap": 2.0},
    "alibi": {"alibi_slopes": SLOPES},
    # a slope for every document and head
    "alibi-documents": {"causal": True, "alibi_slopes": torch.linspace(0, 2, 32).view(8, 4)},
    "sinks": {"sinks": SINKS},
    "sinks-causal": {"causal": True, "sinks": SINKS},
    "dropout": DROPOUT,
    "dropout-causal": {"causal": True, **DROPOUT},
    "all": {
        "window_size": (33, 5),
        "softmax_scale": 0.4,
        "softcap": 3.0,
        "alibi_slopes": SLOPES,
        "sinks": SINKS,
        **DROPOUT,
    },
}
# values of another size than keys, smaller and larger; not of a vector's size
VALUES = {"causal": 40, "softcap": 3, "window-both": 24, "all": 5}


@pytest.fixture(params=spec.IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    return spec.force(request.param, monkeypatch)


def tensors_of(option: str, dtype: torch.dtype) -> dict[str, Tensor]:
    # tokens after the last boundary
    tokens_q, tokens_k = sum(RAGGED_Q) + 2, sum(RAGGED_K) + 3
    return spec.inputs(tokens_q, tokens_k, values=VALUES.get(option), dtype=dtype)


@functools.cache
def expected(option: str, dtype: torch.dtype, with_lse: bool) -> tuple[spec.Results, spec.Results]:
    """Return what is exact for inputs of a dtype, and what plain PyTorch makes of them."""
    define, tensors = spec.defined(RAGGED_Q, RAGGED_K), tensors_of(option, dtype)
    exact = spec.run(define, tensors, OPTIONS[option], torch.float64, with_lse=with_lse)
    return exact, spec.run(define, tensors, OPTIONS[option], with_lse=with_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_results_and_gradients(check_error, implementation, option, dtype):
    tensors = tensors_of(option, dtype)
    attend, (exact, plain) = spec.packed(RAGGED_Q, RAGGED_K), expected(option, dtype, True)
    plain = spec.with_blocks(implementation, attend, tensors, OPTIONS[option], exact, plain)
    spec.check_all(check_error, spec.run(attend, tensors, OPTIONS[option]), exact, plain)


# torch's kernel takes no gradient of lse, so without one there is another path
@pytest.mark.parametrize("option", ["full", "causal", "sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_without_lse(check_error, implementation, option, dtype):
    tensors = tensors_of(option, dtype)
    attend, (exact, plain) = spec.packed(RAGGED_Q, RAGGED_K), expected(option, dtype, False)
    case = implementation, attend, tensors, OPTIONS[option], exact, plain
    plain = spec.with_blocks(*case, with_lse=False)
    actual = spec.run(attend, tensors, OPTIONS[option], with_lse=False)
    spec.check_all(check_error, actual, exact, plain)


@pytest.mark.parametrize("impl", ["split", "dense", "reference"])
@pytest.mark.parametrize("option", OPTIONS)
def test_float64_equals_the_definition(monkeypatch, option, impl):
    fixed = {"impl": "reference"} if impl == "reference" else {}
    if not fixed:
        spec.force(impl, monkeypatch)
    tensors = tensors_of(option, torch.float64)
    actual = spec.run(spec.packed(RAGGED_Q, RAGGED_K, **fixed), tensors, OPTIONS[option])
    exact, _ = expected(option, torch.float64, True)
    torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
# query heads to a key head: one, two, and three that are no power of two
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_against_torchs_own_attention(check_error, implementation, dtype, causal, heads, kv_heads):
    tokens, options = sum(RAGGED), {"causal": causal}
    tensors = spec.inputs(tokens, tokens, heads=heads, kv_heads=kv_heads, dim=80, dtype=dtype)
    exact = spec.run(spec.defined(RAGGED, RAGGED), tensors, options, torch.float64, with_lse=False)
    actual = spec.run(spec.packed(RAGGED, RAGGED), tensors, options, with_lse=False)
    plain = spec.run(spec.torchs(RAGGED, RAGGED), tensors, options, with_lse=False)
    for name in ("out", "q.grad", "k.grad", "v.grad"):
        check_error(actual[name], exact[name], plain[name], name)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
# both sides of the length from which bfloat16 stays bfloat16 in the backward pass, and far above
@pytest.mark.parametrize("length", [319, 320, 700])
# as on processors with and without matrix units for bfloat16
@pytest.mark.parametrize("native", [True, False], ids=["native", "upcast"])
def test_long_bfloat16_documents(check_error, monkeypatch, causal, length, native):
    spec.force("split", monkeypatch)
    monkeypatch.setattr(_split, "_is_native", lambda dtype: native and dtype == torch.bfloat16)
    tensors = spec.inputs(length + 1, length + 1, dim=64, dtype=torch.bfloat16)
    lengths, options = (length, 1), {"causal": causal}
    define = spec.defined(lengths, lengths)
    spec.check_all(
        check_error,
        spec.run(spec.packed(lengths, lengths), tensors, options, with_lse=False),
        spec.run(define, tensors, options, torch.float64, with_lse=False),
        spec.run(define, tensors, options, with_lse=False),
    )


def test_two_threads_give_the_bits_of_one(implementation):
    tensors = tensors_of("full", torch.float32)
    attend = spec.packed(RAGGED_Q, RAGGED_K)
    expected = spec.run(attend, tensors, {"causal": True})
    torch.set_num_threads(2)
    spec.assert_same_bits(spec.run(attend, tensors, {"causal": True}), expected)


# every window of a document with as many, more and fewer keys than queries
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (2, 5), (5, 3)])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_windows_see_the_keys_that_the_definition_names(implementation, queries, keys, causal):
    q, k = torch.randn(queries, 1, 8), torch.randn(keys, 1, 8)
    cu_q, cu_k = spec.boundaries([queries]), spec.boundaries([keys])
    # with these values the result is the weights
    v = torch.eye(keys)[:, None]
    for left, right in itertools.product((-1, 0, 1, 3, 100), repeat=2):
        weights = varlen_attention(q, k, v, cu_q, cu_k, causal=causal, window_size=(left, right))
        for i, j in itertools.product(range(queries), range(keys)):
            place = i + keys - queries
            seen = left < 0 or j >= place - left
            seen &= (j <= place) if causal else (right < 0 or j <= place + right)
            assert bool(weights[i, 0, j] > 0) == seen, (left, right, i, j)


@pytest.mark.parametrize("name", ["cpu", "split"])
@hypothesis.settings(deadline=None, max_examples=40, derandomize=True, database=None)
@hypothesis.given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6),
    tail=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (5, 1)]),
    sizes=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    causal=st.booleans(),
    window=st.tuples(st.integers(-1, 45), st.integers(-1, 45)),
    softcap=st.sampled_from([0.0, 1.5]),
    sinks=st.booleans(),
)
def test_any_layout_of_documents(name, lengths, tail, heads, sizes, causal, window, softcap, sinks):
    lengths_q, lengths_k = ([pair[side] for pair in lengths] for side in (0, 1))
    tokens = sum(lengths_q) + tail[0], sum(lengths_k) + tail[1]
    tensors = spec.inputs(
        *tokens, heads=heads[0], kv_heads=heads[1], dim=sizes[0], values=sizes[1]
    )  # fmt: skip
    options: Options = {"causal": causal, "window_size": window, "softcap": softcap}
    if sinks:
        options["sinks"] = torch.linspace(-2, 2, heads[0])
    exact = spec.run(spec.defined(lengths_q, lengths_k), tensors, options, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        spec.force(name, patch)
        actual = spec.run(spec.packed(lengths_q, lengths_k), tensors, options)
    # float32, so that every implementation is met
    torch.testing.assert_close(actual, exact, rtol=1e-4, atol=2e-5, check_dtype=False)


# scores near half precision's largest, where exponentials of unshifted ones overflow
def test_large_scores_do_not_overflow(check_error, implementation):
    tokens, options = sum(RAGGED), {"causal": True}
    tensors = spec.inputs(tokens, tokens, dtype=torch.float16)
    tensors["q"], tensors["k"] = 30 * tensors["q"], 30 * tensors["k"]
    define = spec.defined(RAGGED, RAGGED)
    exact = spec.run(define, tensors, options, torch.float64)
    actual = spec.run(spec.packed(RAGGED, RAGGED), tensors, options)
    spec.check_all(check_error, actual, exact, spec.run(define, tensors, options))


# what is kept of a row of weights is lse, to its own rounding: plain PyTorch keeps the weights
def test_large_scores_are_as_exact_as_lse(implementation):
    tokens, options = sum(RAGGED), {"causal": True}
    tensors = spec.inputs(tokens, tokens)
    tensors["q"], tensors["k"] = 30 * tensors["q"], 30 * tensors["k"]
    exact = spec.run(spec.defined(RAGGED, RAGGED), tensors, options, torch.float64)
    actual = spec.run(spec.packed(RAGGED, RAGGED), tensors, options)
    rounding = torch.finfo(torch.float32).eps * float(exact["lse"].abs().max())
    for name, value in actual.items():
        error = (value.double() - exact[name]).abs().max()
        assert bool(error <= 4 * rounding * exact[name].abs().max()), f"{name}: {error:.1e}"


# one key to a query: the result is its value, and lse its score
def test_window_of_one_key(implementation):
    tensors, options = spec.inputs(sum(RAGGED), sum(RAGGED)), {"window_size": (0, 0)}
    actual = spec.run(spec.packed(RAGGED, RAGGED), tensors, options)
    exact = spec.run(spec.defined(RAGGED, RAGGED), tensors, options, torch.float64)
    # the gradient of the score is a difference of equal products, of 16 channels
    torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-5, check_dtype=False)


# more keys than queries and fewer, and a document without either
SMALL_Q, SMALL_K = (1, 0, 2, 1), (3, 1, 1, 0)
SMALL: dict[str, Options] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (1, 1)},
    "softcap-alibi": {"softcap": 1.0, "alibi_slopes": torch.tensor([0.5, 0.1])},
    "dropout": DROPOUT,
    "global": {"causal": True, "window_size": (0, 0), "global_tokens": 1},
    "softplus": {"causal": True, "weights": "softplus"},
    "re-weighted": {"weights": "softplus", "reweight": (2.0, 0.7)},
}


@pytest.mark.parametrize("option", SMALL)
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_gradcheck(option, impl):
    tensors = spec.inputs(4, 5, heads=2, kv_heads=1, dim=2, dtype=torch.float64)
    leaves = [tensors[name].requires_grad_() for name in "qkv"]
    if SMALL[option].get("weights") != "softplus":
        leaves.append(torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True))
    attend = spec.packed(SMALL_Q, SMALL_K, impl=impl)

    def both(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, lse = attend(q, k, v, sinks=sinks, **SMALL[option])
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(both, leaves)
    # every operation of the reference, and of what is made of two calls
    if impl == "reference" and option in ("causal", "softcap-alibi", "global", "re-weighted"):
        assert torch.autograd.gradgradcheck(both, leaves)


def test_fused_refuses_a_second_derivative():
    q, k, v, cu = torch.randn(4, 1, 8), torch.randn(4, 1, 8), torch.randn(4, 1, 8), [4]
    out = varlen_attention(q.requires_grad_(), k, v, spec.boundaries(cu))
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
