"""Lambda masks with a distance limit, softplus weights, context groups, each by its formula."""

import functools
import math
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from apical.kernels.varlen_attention import PackedLayout, varlen_attention

from . import varlen_attention_definition as spec
from .varlen_attention_definition import RAGGED_K, RAGGED_Q, Options

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS_Q, TOKENS_K = sum(RAGGED_Q) + 2, sum(RAGGED_K) + 3
SLOPES = torch.tensor([0.5, 0.05, 0.0, 1.0])
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=spec.IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    return spec.force(request.param, monkeypatch)


def second_pair() -> Options:
    draw = torch.Generator().manual_seed(1)
    return {
        "q_global": torch.randn(TOKENS_Q, 4, 16, generator=draw),
        "k_global": torch.randn(TOKENS_K, 2, 16, generator=draw),
    }


LAMBDA: Options = {"causal": True, "window_size": (7, 0), "global_tokens": 3}
LAMBDAS: dict[str, Options] = {
    "mask": LAMBDA,
    # more first tokens than most documents have, and a window of one key
    "long": {"causal": True, "window_size": (0, -1), "global_tokens": 80},
    "limit": {**LAMBDA, **second_pair()},
    "limit-of-queries": {**LAMBDA, "q_global": second_pair()["q_global"]},
    "limit-of-keys": {**LAMBDA, "k_global": second_pair()["k_global"]},
    # ALiBi's distance is i - j for one pair, min(i - j, 8) for two
    "alibi": {**LAMBDA, "alibi_slopes": SLOPES},
    "alibi-limit": {**LAMBDA, **second_pair(), "alibi_slopes": SLOPES},
    "alibi-limit-documents": {
        **LAMBDA,
        **second_pair(),
        "alibi_slopes": torch.linspace(0, 2, 32).view(8, 4),
    },
    "all": {
        **LAMBDA,
        **second_pair(),
        "alibi_slopes": SLOPES,
        "softcap": 3.0,
        "softmax_scale": 0.4,
        "sinks": torch.tensor([1.0, -2.0, 0.0, 6.0]),
        "dropout_p": 0.3,
        "dropout_seed": torch.tensor([11]),
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", LAMBDAS)
def test_lambda_mask_with_distance_limit(check_error, implementation, option, dtype):
    tensors = spec.inputs(TOKENS_Q, TOKENS_K, dtype=dtype)
    options = dict(LAMBDAS[option])
    for name in ("q_global", "k_global"):
        if name in options:
            options[name] = options[name].to(dtype)
    exact = spec.run(spec.defined(RAGGED_Q, RAGGED_K), tensors, options, torch.float64)
    # two softmaxes that are put together round more often than one: as in plain PyTorch
    plain = spec.run(spec.packed(RAGGED_Q, RAGGED_K, impl="reference"), tensors, options)
    attend = spec.packed(RAGGED_Q, RAGGED_K)
    plain = spec.with_blocks(implementation, attend, tensors, options, exact, plain)
    spec.check_all(check_error, spec.run(attend, tensors, options), exact, plain)


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("option", LAMBDAS)
def test_lambda_mask_in_float64(option, impl):
    tensors = spec.inputs(TOKENS_Q, TOKENS_K, dtype=torch.float64)
    attend = spec.packed(RAGGED_Q, RAGGED_K, impl=impl)
    actual = spec.run(attend, tensors, LAMBDAS[option])
    exact = spec.run(spec.defined(RAGGED_Q, RAGGED_K), tensors, LAMBDAS[option])
    torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-11)


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """Return x (T, H, D) rotated by angles that grow with the places (T,)."""
    half = x.shape[-1] // 2
    angles = places[:, None, None] * 10.0 ** -torch.arange(half, dtype=x.dtype)
    a, b = x.split(half, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)


def test_lm_infinite_limits_the_distance_of_rotary_positions():
    tokens, window, first = 20, 6, 2
    q, k, v = (torch.randn(tokens, 1, 8, dtype=torch.float64) for _ in range(3))
    place = torch.arange(tokens, dtype=torch.float64)
    logits = torch.full((tokens, tokens), -math.inf, dtype=torch.float64)
    for i in range(tokens):
        for j in range(i + 1):
            if i - j < window or j < first:
                turned = rotated(q[i : i + 1], place.new_tensor([min(i - j, window)]))
                logits[i, j] = turned.flatten() @ k[j].flatten() / 8**0.5
    out = varlen_attention(
        rotated(q, place),
        rotated(k, place),
        v,
        spec.boundaries([tokens]),
        causal=True,
        window_size=(window - 1, 0),
        global_tokens=first,
        q_global=rotated(q, torch.full_like(place, window)),
        k_global=k,
    )
    torch.testing.assert_close(out[:, 0], logits.softmax(-1) @ v[:, 0], rtol=1e-11, atol=1e-11)


def softplus_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    reweight: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return arXiv:2501.13428's attention from its formulas, row by row of a dense matrix."""
    document, distance, _ = spec.places(RAGGED_Q, RAGGED_K, (len(q), len(k)))
    left, right = (10**9 if side < 0 else side for side in window_size)
    seen = (document >= 0) & (distance <= left) & (distance >= (0 if causal else -right))
    visible = seen.sum(1).to(q.dtype if q.dtype == torch.float64 else torch.float32)[:, None]
    if softmax_scale is None:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        scale = math.log(q.shape[-1]) * visible.clamp(min=1).log()
    else:
        scale = torch.full_like(visible, softmax_scale)
    # half precision has no digits for the second stage
    a = torch.nn.functional.softplus(scale * spec.products(q, k)) * seen
    a, lse = _normalised(a)
    if reweight is not None:
        power, offset = reweight
        offsets = torch.full_like(visible, offset).masked_fill(visible <= 3, 0.0)
        a, lse = _normalised((visible * a - offsets).relu() ** power)
    return spec.weighted(a, v), lse


def _normalised(a: Tensor) -> tuple[Tensor, Tensor]:
    total = a.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return a / total, total.log().masked_fill(empty, -math.inf)[..., 0].T


SOFTPLUS: dict[str, Options] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (9, 0)},
    "two-sided": {"window_size": (2, 4)},
    "scale": {"causal": True, "softmax_scale": 0.3},
    # far into the tail, where softplus(x) is exp(x)
    "scale-large": {"softmax_scale": 9.0},
}
REWEIGHTED: dict[str, Options] = {
    # the paper's, and the one it has for the length of training
    "paper": {"causal": True, "reweight": (15.0, 1.0)},
    "power-3": {"causal": True, "reweight": (3.0, 1.0)},
    "full": {"reweight": (3.0, 1.0)},
    "no-offset": {"causal": True, "reweight": (2.0, 0.0)},
    "window": {"causal": True, "window_size": (9, 0), "reweight": (3.0, 0.9)},
    # a window in which no query has an offset
    "window-of-three": {"causal": True, "window_size": (2, 0), "reweight": (3.0, 1.0)},
    "right": {"window_size": (-1, 1), "reweight": (3.0, 0.5)},
    "scale": {"causal": True, "softmax_scale": 0.3, "reweight": (3.0, 0.9)},
}
CASES = {**SOFTPLUS, **{f"re-{name}": options for name, options in REWEIGHTED.items()}}


@functools.cache
def softplus_expected(option: str, dtype: torch.dtype) -> tuple[spec.Results, spec.Results]:
    tensors = spec.inputs(TOKENS_Q, TOKENS_K, dtype=dtype)
    exact = spec.run(softplus_definition, tensors, CASES[option], torch.float64)
    return exact, spec.run(softplus_definition, tensors, CASES[option])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", CASES)
def test_softplus_weights(check_error, implementation, option, dtype):
    tensors = spec.inputs(TOKENS_Q, TOKENS_K, dtype=dtype)
    options = {"weights": "softplus", **CASES[option]}
    attend, (exact, plain) = spec.packed(RAGGED_Q, RAGGED_K), softplus_expected(option, dtype)
    plain = spec.with_blocks(implementation, attend, tensors, options, exact, plain)
    spec.check_all(check_error, spec.run(attend, tensors, options), exact, plain)


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("option", CASES)
def test_softplus_weights_in_float64(option, impl):
    tensors = spec.inputs(TOKENS_Q, TOKENS_K, dtype=torch.float64)
    attend = spec.packed(RAGGED_Q, RAGGED_K, impl=impl)
    actual = spec.run(attend, tensors, {"weights": "softplus", **CASES[option]})
    exact, _ = softplus_expected(option, torch.float64)
    torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-9)


def test_re_weighted_rows_at_the_start_are_not_empty(implementation):
    q, k, v = (torch.randn(9, 1, 8) for _ in range(3))
    cu = spec.boundaries([4, 5])
    out = varlen_attention(q, k, v, cu, causal=True, weights="softplus", reweight=(15.0, 1.0))
    # a first query sees its own key alone, of weight 1, from which the offset would leave 0
    torch.testing.assert_close(out[[0, 4]], v[[0, 4]])
    assert bool((out != 0).all())


@pytest.mark.parametrize("reweight", [None, (3.0, 1.0)])
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_softplus_of_rows_that_hold_anything(impl, reweight):
    # two queries too many for causal; a document without keys; one token past the end
    lengths_q, lengths_k = (5, 2, 3), (3, 0, 4)
    tensors = spec.inputs(11, 8)
    options = {"weights": "softplus", "causal": True, "reweight": reweight}
    attend = spec.packed(lengths_q, lengths_k, impl=impl)
    expected = spec.run(attend, tensors, options)
    for name in ("q", "grad", "grad_lse"):
        tensors[name][[0, 1, 5, 6, 10]] = math.nan
    tensors["k"][7], tensors["v"][7] = math.nan, math.nan
    spec.assert_same_bits(spec.run(attend, tensors, options), expected)


def test_own_softplus_scores_do_not_know_the_length_of_vectors():
    tensors = spec.inputs(9, 9, dtype=torch.float64)
    q, k, v, cu = tensors["q"], tensors["k"], tensors["v"], spec.boundaries([4, 5])
    want = varlen_attention(q, k, v, cu, weights="softplus")
    got = varlen_attention(7 * q, k * torch.rand(9, 2, 1).double(), v, cu, weights="softplus")
    torch.testing.assert_close(got, want)


def test_context_groups_are_documents():
    # neighbours of one number see each other; the same number later is another group
    lengths, groups, merged = (3, 0, 4, 2, 5, 1), (7, 7, 7, 2, 7, 7), (7, 2, 6)
    layout = PackedLayout.from_lengths(lengths, groups=groups)
    assert layout.bounds_q == [0, *accumulate(merged)]
    q, k, v = (torch.randn(15, 2, 8) for _ in range(3))
    got = varlen_attention(q, k, v, layout, causal=True)
    want = varlen_attention(q, k, v, spec.boundaries(merged), causal=True)
    assert torch.equal(got, want)
    apart = varlen_attention(q, k, v, spec.boundaries(lengths), causal=True)
    # each document's first query sees more than itself
    assert not torch.isclose(got[3], apart[3]).any()
    torch.testing.assert_close(got[:3], apart[:3])


def test_context_groups_of_queries_and_keys():
    layout = PackedLayout.from_lengths((2, 3, 4), (5, 0, 6), groups=(0, 0, 1))
    assert (layout.bounds_q, layout.bounds_k) == ([0, 5, 9], [0, 5, 11])
