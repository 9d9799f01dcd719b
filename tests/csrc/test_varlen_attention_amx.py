"""The bfloat16 attention of the C++ library on the matrix unit, where the processor has one."""

import math
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from apical.kernels._common import native

UNBOUNDED = 2**31 - 1


def supported() -> bool:
    return native.loaded() and torch.ops.apical.amx_supported()


needs_amx = pytest.mark.skipif(not supported(), reason="no library, or no matrix unit")

# one token, around a tile of 16 and two of them, around one and two blocks of 256 keys or rows
LENGTHS = (1, 15, 17, 32, 33, 0, 257, 511, 514)
# fewer and more keys than queries, none, and up to five blocks of 256
MORE_KEYS = (3, 2, 40, 64, 1, 4, 0, 700, 1030)


class Rules(NamedTuple):
    scale: float = 0.3
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    limit: int = UNBOUNDED


class Packed(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    documents: Tensor  # (N, 5)
    grad_lse: Tensor | None = None
    sinks: Tensor | None = None


def packed(
    sizes: tuple[int, int] = (64, 64), heads: tuple[int, int] = (4, 2), more_keys: bool = True
) -> Packed:
    ends_q = [0, *accumulate(LENGTHS)]
    ends_k = [0, *accumulate(MORE_KEYS if more_keys else LENGTHS)]
    bounds = ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], range(len(LENGTHS))
    documents = torch.tensor(list(zip(*bounds, strict=True)))
    q, k, v, grad = (
        torch.randn(tokens, H, size).bfloat16()
        for tokens, H, size in (
            (ends_q[-1], heads[0], sizes[0]),
            (ends_k[-1], heads[1], sizes[0]),
            (ends_k[-1], heads[1], sizes[1]),
            (ends_q[-1], heads[0], sizes[1]),
        )
    )
    return Packed(q, k, v, grad, documents)


def attention(x: Packed, rules: Rules) -> tuple[Tensor, ...]:
    """Return the result, lse and the gradients of the operations; NaN where they do not write."""
    out, grads = torch.full_like(x.grad, math.nan), [torch.full_like(t, math.nan) for t in x[:3]]
    lse = torch.full(x.q.shape[:2], math.nan)
    ops = torch.ops.apical
    ops.varlen_attention_amx_forward(*x[:3], x.documents, x.sinks, *rules, out, lse)
    ops.varlen_attention_amx_backward(
        x.grad, x.grad_lse, *x[:3], out, lse, x.documents, *rules, *grads
    )
    return out, lse, *grads


def written_out(x: Packed, rules: Rules, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the same of attention written out, computed in dtype."""
    q, k, v = (t.to(dtype).requires_grad_() for t in x[:3])
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for q0, q1, k0, k1, _ in x.documents.tolist():
        keys, values = (t[k0:k1].repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
        scores = (q[q0:q1].transpose(0, 1) @ keys.mT) * rules.scale
        j = torch.arange(k1 - k0)
        behind = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - j
        seen = (behind <= rules.left) & (-behind <= rules.right) & (j < rules.limit)
        scores = scores.masked_fill(~seen, -math.inf)
        if x.sinks is not None:
            sinks = x.sinks.to(dtype)[:, None, None].expand(-1, q1 - q0, 1)
            scores = torch.cat((scores, sinks), -1)
        lse = scores.logsumexp(-1)
        # a row that sees nothing: 0, and no NaN from inf - inf
        p = (scores - lse.where(lse.isfinite(), 0).unsqueeze(-1)).exp()[..., : k1 - k0]
        outs.append((p @ values).transpose(0, 1))
        lses.append(lse.transpose(0, 1))
    out, lse = torch.cat(outs), torch.cat(lses)
    grads = [x.grad.to(dtype)]
    if x.grad_lse is not None:
        grads.append(x.grad_lse.to(dtype).where(lse.isfinite(), 0))
    found = torch.autograd.grad((out, lse)[: len(grads)], (q, k, v), grads, allow_unused=True)
    return out.detach(), lse.detach(), *found


def check(x: Packed, rules: Rules) -> None:
    names, ours = ("out", "lse", "q", "k", "v"), attention(x, rules)
    exact, plain = (written_out(x, rules, dtype) for dtype in (torch.float64, torch.bfloat16))
    for name, actual, true, same in zip(names, ours, exact, plain, strict=True):
        finite = true.isfinite()
        assert torch.equal(actual.double()[~finite], true[~finite]), name
        if not finite.any():
            continue
        error, budget = ((t.double() - true)[finite].abs().max() for t in (actual, same))
        # sums stay in float32 whatever the operands; so does lse
        budget, digits = (0, 22) if name == "lse" else (2 * budget, 8)
        assert error <= budget + true[finite].abs().max() * 2**-digits + 1e-5, name


@needs_amx
@pytest.mark.parametrize(
    "rules",
    [
        Rules(),
        Rules(right=0),
        # windows: narrower than a tile, wider than one, and of no more than the diagonal
        Rules(left=5, right=3),
        Rules(left=70, right=0),
        Rules(left=0, right=0),
        # the first rows see nothing; with a window, nothing near
        Rules(right=-9, limit=5),
        Rules(left=90, right=-40),
        # turns the order of scores around
        Rules(scale=-0.2, right=0),
        Rules(scale=0.0),
        # weights far below the smallest float
        Rules(scale=30.0),
    ],
    ids=str,
)
def test_every_mask(rules):
    check(packed(), rules)


@needs_amx
def test_every_edge_of_a_square():
    # 64 rows and 96 keys: either end of what a row sees at each place in squares of 32
    q, k, v, grad = (torch.randn(tokens, 1, 8).bfloat16() for tokens in (64, 96, 96, 64))
    x = Packed(q, k, v, grad, torch.tensor([[0, 64, 0, 96, 0]]))
    for edge in range(33):
        check(x, Rules(left=edge))
        check(x, Rules(right=-edge))


@needs_amx
# one channel; no whole tile; different sizes of v; the largest; no result wanted but lse
@pytest.mark.parametrize("sizes", [(1, 1), (20, 33), (96, 16), (256, 200), (64, 0)])
@pytest.mark.parametrize("heads", [(2, 2), (3, 1)])
def test_every_size(sizes, heads):
    x = packed(sizes, heads, more_keys=False)
    check(x._replace(grad_lse=torch.randn(x.q.shape[:2])), Rules(right=0))


@needs_amx
@pytest.mark.parametrize("rules", [Rules(), Rules(left=20, right=0), Rules(right=-9, limit=5)])
def test_sinks_and_gradient_of_lse(rules):
    x = packed()
    # below, among and far above the scores
    sinks = torch.tensor([-50.0, 0.0, 3.0, 80.0])
    check(x._replace(sinks=sinks, grad_lse=torch.randn(x.q.shape[:2])), rules)


@needs_amx
def test_any_strides():
    x, rules = packed(more_keys=False), Rules(right=0)
    alone = attention(x, rules)
    # one projection, heads first, and off any alignment
    fused = torch.randn(x.q.shape[0], 3, 4, 65).bfloat16()[..., 1:]
    k, v = (fused[:, i, :2].copy_(t) for i, t in ((1, x.k), (2, x.v)))
    q = x.q.transpose(0, 1).contiguous().transpose(0, 1)
    again = attention(x._replace(q=q, k=k, v=v), rules)
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))


@needs_amx
def test_packed_is_alone_whatever_lies_outside():
    x, rules = packed(), Rules(left=300, right=0)
    together = attention(x, rules)
    for i, (q0, q1, k0, k1, _) in enumerate(x.documents.tolist()):
        q, k, v, grad = (torch.full_like(t, math.nan) for t in x[:4])
        for to, like in ((q, x.q), (grad, x.grad)):
            to[q0:q1] = like[q0:q1]
        for to, like in ((k, x.k), (v, x.v)):
            to[k0:k1] = like[k0:k1]
        alone = attention(Packed(q, k, v, grad, x.documents[i : i + 1]), rules)
        for j, (a, b) in enumerate(zip(together, alone, strict=True)):
            first, end = (k0, k1) if j >= 3 else (q0, q1)
            assert torch.equal(a[first:end], b[first:end])
            # and nothing else is written
            assert b[:first].isnan().all()
            assert b[end:].isnan().all()


@needs_amx
def test_threads_change_no_bit():
    x, rules = packed(heads=(6, 3)), Rules(right=0)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(attention(x, rules))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_amx
def test_what_scratch_held_before_is_harmless(tmp_path):
    x, rules = packed((40, 24)), Rules(left=40, right=0)
    code = f"""
import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_varlen_attention_amx import Packed, Rules, attention, native
assert native.loaded()
x = Packed(*torch.load({str(tmp_path / "in")!r}))
torch.save(attention(x, Rules{tuple(rules)}), {str(tmp_path / "out")!r})
"""
    torch.save(tuple(x), tmp_path / "in")
    results = []
    # the C library fills what it hands out with the complement: bytes 0xff, NaN, and 0x80, tiny
    for fill in ("256", "127"):
        environment = {**os.environ, "MALLOC_PERTURB_": fill}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        results.append(torch.load(tmp_path / "out"))
    for a, b, here in zip(*results, attention(x, rules), strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        assert torch.equal(a.nan_to_num(7), here.nan_to_num(7))


@needs_amx
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(4, 2, 8)}, "q must be bfloat16"),
        ({"k": torch.ones(4, 8, 2).bfloat16().mT}, "k must be .* contiguous channels"),
        ({"documents": torch.tensor([[0, 5, 0, 4, 0]])}, "documents must lie inside"),
        ({"documents": torch.tensor([[0, 4, 0, 4]])}, r"contiguous \(N, 5\)"),
        ({"sinks": torch.ones(3)}, r"sinks must be .* \(H,\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_checks_at_the_door(change, message):
    one = torch.ones(4, 2, 8).bfloat16()
    documents = torch.tensor([[0, 4, 0, 4, 0]])
    good = {"q": one, "k": one, "v": one, "documents": documents, "sinks": None}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.apical.varlen_attention_amx_forward(
            *(good | change).values(), *Rules(), torch.empty_like(one), torch.empty(4, 2)
        )


@pytest.mark.skipif(not native.loaded(), reason=native.status()[1])
def test_a_named_instruction_set_leaves_it_out():
    code = """
import torch
from apical.kernels._common import native
assert native.loaded() and not torch.ops.apical.amx_supported()
"""
    environment = {**os.environ, "APICAL_ISA": "baseline"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
