"""What packed attention refuses, and the signatures and kernels of other libraries."""

import inspect
import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from apical.kernels.varlen_attention import _peers, flash_attn_varlen_func, varlen_attention
from apical.kernels.varlen_attention._layout import layout_of
from apical.kernels.varlen_attention._rules import Rules

from . import varlen_attention_definition as spec

pytestmark = pytest.mark.usefixtures("one_thread")


def boundaries(*ends: int) -> Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32)


def heads(tokens: int, count: int, dim: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, count, dim).to(dtype)


Q, K, CU = heads(5, 4), heads(5, 2), boundaries(2, 5)
WINDOW: dict[str, Any] = {"causal": True, "window_size": (1, 0), "global_tokens": 1}
SOFTPLUS: dict[str, Any] = {"weights": "softplus"}

REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "rank": ((Q[0], K, K, CU), {}, r"q must have shape \(T H D\), got \(4, 8\)"),
    "head size of k": ((Q, K[..., :7], K, CU), {}, r"k has D=7, .* D=8"),
    "length of v": ((Q, K, heads(6, 2), CU), {}, r"v has S=6, .* S=5"),
    "heads of v": ((Q, K, heads(5, 4), CU), {}, r"v has K=4, .* K=2"),
    "heads": ((Q, heads(5, 3), heads(5, 3), CU), {}, r"H=4 .* K=3; .* multiple of K"),
    "no heads": ((Q[:, :0], K, K, CU), {}, r"H=0 .* none may be 0"),
    "no channels": ((Q[..., :0], K[..., :0], K, CU), {}, r"D=0 channels; expected 1 to 256"),
    "no values": ((Q, K, K[..., :0], CU), {}, r"E=0 channels; expected 1 to 256"),
    "many channels": ((Q, K, heads(5, 2, 257), CU), {}, r"E=257 channels; expected 1 to 256"),
    "dtypes": ((Q, K.half(), K, CU), {}, r"share a dtype, got torch.float32, torch.float16"),
    "integers": ((Q.int(), K.int(), K.int(), CU), {}, r"q has dtype torch.int32; expected"),
    "devices": ((Q, K.to("meta"), K, CU), {}, r"on one device, got cpu, meta and cpu"),
    "float boundaries": ((Q, K, K, CU.float()), {}, r"cu_seqlens_q has dtype torch.float32"),
    "boundaries elsewhere": ((Q, K, K, CU, CU.to("meta")), {}, r"cu_seqlens_k is on meta"),
    "rank of boundaries": ((Q, K, K, CU[None]), {}, r"cu_seqlens_q must have shape \(N\+1\)"),
    "other count": ((Q, K, K, CU, CU[:2]), {}, r"cu_seqlens_k has N\+1=2, .* N\+1=3"),
    "no boundaries": ((Q, K, K, CU[:0]), {}, r"cu_seqlens_q must start with 0, got \[\]"),
    "late start": ((Q, K, K, CU[1:]), {}, r"cu_seqlens_q must start with 0, got \[2\]"),
    "lengths": ((Q, K, K, boundaries(3, 2)), {}, r"cu_seqlens_q .* decrease, got 3 then 2 .* 1"),
    "end of q": ((Q[:4], K, K, CU), {}, r"cu_seqlens_q ends at 5, but there are 4 tokens"),
    "end of k": ((Q, K[:4], K[:4], CU), {}, r"which bounds k too, ends at 5, .* 4 tokens"),
    "own end of k": ((Q, K[:4], K[:4], CU, CU.clone()), {}, r"cu_seqlens_k ends at 5, .* 4 tok"),
    "window": ((Q, K, K, CU), {"window_size": (-2, 0)}, r"window_size is \(-2, 0\); .* -1 for all"),
    "one side": ((Q, K, K, CU), {"window_size": (3,)}, r"window_size is \(3,\); expected two"),
    "softcap": ((Q, K, K, CU), {"softcap": -1.0}, r"softcap is -1.0; expected a positive cap"),
    "dropout": ((Q, K, K, CU), {"dropout_p": 1.0}, r"dropout_p is 1.0; expected .* less than 1"),
    "seed": (
        (Q, K, K, CU),
        {"dropout_p": 0.1, "dropout_seed": torch.tensor(1)},
        r"dropout_seed is torch.int64 of shape \(\); expected int64 of shape \(1,\)",
    ),
    "seed elsewhere": (
        (Q, K, K, CU),
        {"dropout_p": 0.1, "dropout_seed": torch.tensor([1], device="meta")},
        r"dropout_seed is on meta; expected cpu",
    ),
    "slopes": (
        (Q, K, K, CU),
        {"alibi_slopes": torch.rand(3)},
        r"alibi_slopes has shape \(3,\); expected \(4,\) or \(2, 4\)",
    ),
    "integer slopes": (
        (Q, K, K, CU),
        {"alibi_slopes": torch.arange(4)},
        r"alibi_slopes is torch.int64 on cpu; expected floats on cpu",
    ),
    "gradient of slopes": (
        (Q, K, K, CU),
        {"alibi_slopes": torch.rand(4, requires_grad=True)},
        r"alibi_slopes requires a gradient, which it has not; detach it",
    ),
    "sinks": (
        (Q, K, K, CU),
        {"sinks": torch.rand(2, 4)},
        r"sinks has shape \(2, 4\); expected \(4,\)",
    ),
    "weights": ((Q, K, K, CU), {"weights": "relu"}, r"weights must be .*, got 'relu'"),
    "softplus with sinks": (
        (Q, K, K, CU),
        {**SOFTPLUS, "sinks": torch.rand(4), "softcap": 1.0},
        r"weights='softplus' has no softcap, sinks; leave it out",
    ),
    "softplus with global tokens": (
        (Q, K, K, CU),
        {**SOFTPLUS, **WINDOW},
        r"weights='softplus' has no global_tokens; leave it out",
    ),
    "re-weighted softmax": (
        (Q, K, K, CU),
        {"reweight": (3.0, 1.0)},
        r"reweight goes with weights='softplus'; leave it out",
    ),
    "power": (
        (Q, K, K, CU),
        {**SOFTPLUS, "reweight": (0.0, 1.0)},
        r"reweight is \(0.0, 1.0\); expected \(power, offset\), the power above 0",
    ),
    "re-weighted window": (
        (Q, K, K, CU),
        {**SOFTPLUS, "reweight": (3.0, 1.0), "window_size": (3, 3)},
        r"reweight with a window to both sides is not defined; set causal=True",
    ),
    "global tokens without a window": (
        (Q, K, K, CU),
        {"causal": True, "global_tokens": 1},
        r"global_tokens are the keys seen beyond a causal window; set causal=True and",
    ),
    "global tokens that see ahead": (
        (Q, K, K, CU),
        {"window_size": (1, 0), "global_tokens": 1},
        r"global_tokens are the keys seen beyond a causal window; set causal=True and",
    ),
    "few global tokens": (
        (Q, K, K, CU),
        {**WINDOW, "global_tokens": -1},
        r"global_tokens is -1; expected 0 or more",
    ),
    "global queries alone": (
        (Q, K, K, CU),
        {"q_global": Q},
        r"q_global is for global_tokens, of which there are 0; leave it out",
    ),
    "global keys": (
        (Q, K, K, CU),
        {**WINDOW, "k_global": Q},
        r"k_global must be as k, torch.float32 of shape \(5, 2, 8\) on cpu; got .*\(5, 4, 8\)",
    ),
    "implementation": (
        (Q, K, K, CU),
        {"impl": "fast"},
        r"impl must be one of fused, reference, torch, flash-attn; got 'fast'",
    ),
    "lse of another library": (
        (Q, K, K, CU),
        {"impl": "torch", "return_lse": True},
        r"impl='torch' does not differentiate lse; use impl='fused'",
    ),
    "what torch has not": (
        (Q, K, K, CU),
        {"impl": "torch", "softcap": 1.0, "sinks": torch.rand(4)},
        r"impl='torch' has no torch.float32, sinks, softcap; use impl='fused'",
    ),
    "what flash-attn has not": (
        (Q.half(), K.half(), heads(5, 2, 5, torch.float16), CU),
        {"impl": "flash-attn", **WINDOW},
        r"impl='flash-attn' has no values of another head size",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_named_in_one_line(case):
    args, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        varlen_attention(*args, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("impl", ["torch", "flash-attn"])
def test_other_libraries_are_not_fallen_back_from(impl):
    q, k = Q.half(), K.half()
    with pytest.raises(NotImplementedError, match=f"impl='{impl}' runs on CUDA only, q is on cpu"):
        varlen_attention(q, k, k, CU, impl=impl)


def test_flash_attn_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(NotImplementedError, match="impl='flash-attn' needs the flash-attn package"):
        _peers._flash_attn(Q, K, K, CU, CU, 3, 3, (-1, -1), spec.PLAIN)


def on_a_device(impl: str, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, rules: Rules) -> Tensor:
    """Return what `_peers` gives on a GPU, on the CPU."""
    layout = layout_of(cu, None, tokens_q=len(q), tokens_k=len(k))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "is_cuda", True)
        return _peers.forward(impl, q, k, v, layout, rules)


# the argument that each needs, and one that must not be given with it
def test_flash_attn_is_called_with_its_own_arguments(monkeypatch):
    # what has flash-attn's signature stands for it
    stub = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", stub)
    q, k, v = (heads(7, n, dtype=torch.float16) for n in (4, 2, 2))
    slopes = torch.rand(4)
    rules = spec.PLAIN._replace(
        alibi_slopes=slopes, scale=0.3, left=2, right=0, transform="softcap", a=2.0
    )
    got = on_a_device("flash-attn", q, k, v, CU, rules)
    want = varlen_attention(
        q, k, v, CU, causal=True, window_size=(2, 0), softcap=2.0, alibi_slopes=slopes,
        softmax_scale=0.3,
    )  # fmt: skip
    # two tokens after the last boundary, which flash-attn leaves unwritten
    assert torch.equal(got, want)
    assert torch.equal(got[5:], torch.zeros_like(got[5:]))


def test_torchs_varlen_attn_is_called_with_its_own_arguments(monkeypatch):
    import torch.nn.attention.varlen as theirs

    def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
        assert (max_q, max_k, options["enable_gqa"]) == (3, 3, True)
        return varlen_attention(
            query, key, value, cu_seq_q, cu_seq_k, window_size=options["window_size"],
            softmax_scale=options["scale"],
        )  # fmt: skip

    signature = inspect.signature(theirs.varlen_attn)
    stand_in.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(theirs, "varlen_attn", stand_in)
    q, k, v = (heads(7, n, dtype=torch.float16) for n in (4, 2, 2))
    got = on_a_device("torch", q, k, v, CU, spec.PLAIN._replace(scale=0.3, left=2, right=1))
    want = varlen_attention(q, k, v, CU, window_size=(2, 1), softmax_scale=0.3)
    assert torch.equal(got, want)


# flash_attn 2.8, flash_attn_interface.py
SIGNATURE = (
    "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,"
    " softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,"
    " deterministic=False, return_attn_probs=False, block_table=None)"
)


def test_alias_has_flash_attns_signature():
    signature = inspect.signature(flash_attn_varlen_func)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    assert str(inspect.Signature(bare)) == SIGNATURE


def test_first_arguments_of_both_functions_are_the_same():
    # so that a call by position can change its name
    ours, theirs = (
        list(inspect.signature(f).parameters) for f in (varlen_attention, flash_attn_varlen_func)
    )
    assert ours[:7] == theirs[:7]


def test_alias_returns_what_flash_attn_returns():
    q, k, v, slopes = heads(9, 4), heads(9, 2), heads(9, 2), torch.rand(2, 4)
    cu, options = boundaries(4, 8), {"causal": True, "window_size": (2, 0), "softcap": 2.0}
    args = q, k, v, cu, cu, 5, 5
    want, lse = varlen_attention(*args, alibi_slopes=slopes, return_lse=True, **options)
    by_place = flash_attn_varlen_func(*args, 0.0, None, True, (2, 0), 2.0, slopes, True)
    assert torch.equal(by_place, want)
    out, got, nothing = flash_attn_varlen_func(
        *args, alibi_slopes=slopes, return_attn_probs=True, **options
    )
    assert nothing is None
    assert torch.equal(out, want)
    assert got.shape == (4, 9)
    assert torch.equal(got, lse.T)
    assert bool((got[:, 8] == -math.inf).all())


def test_alias_drops_weights():
    q, k, v, cu = heads(9, 4), heads(9, 2), heads(9, 2), boundaries(4, 9)
    torch.manual_seed(1)
    got = flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, 0.5)
    torch.manual_seed(1)
    assert torch.equal(got, varlen_attention(q, k, v, cu, dropout_p=0.5))


def test_alias_refuses_paged_keys():
    with pytest.raises(NotImplementedError, match="block_table: paged keys are for serving"):
        flash_attn_varlen_func(Q, K, K, CU, CU, 3, 3, block_table=CU)
