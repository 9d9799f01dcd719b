"""The attention of the C++ library, on every instruction set, and beyond one block of keys."""

import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor

from apical.kernels._common import native
from apical.kernels.varlen_attention import _cpu, _reference, ops

needs_library = pytest.mark.skipif(not native.loaded(), reason=native.status()[1])

# empty documents, one token, around a vector, and around one and two blocks of 512 keys
LENGTHS = (0, 1, 17, 511, 0, 513, 1030)
# fewer and more keys than queries, across blocks
MORE_KEYS = (3, 2, 9, 530, 0, 1100, 900)


def boundaries(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def attention(
    tensors: tuple[Tensor, ...], cu_q: Tensor, cu_k: Tensor, causal: bool
) -> tuple[Tensor, ...]:
    """Return the result, lse and the gradients of the registered operation."""
    q, k, v, grad = tensors
    layout = cu_q, cu_k, causal, 0.3
    out, lse = ops.forward(q, k, v, *layout)
    return out, lse, *ops.backward(grad, q, k, v, out, lse, *layout)


def truth(
    tensors: tuple[Tensor, ...], cu_q: Tensor, cu_k: Tensor, causal: bool
) -> tuple[Tensor, ...]:
    """Return the same of the reference in float64."""
    *leaves, grad = (x.double() for x in tensors)
    q, k, v = (x.requires_grad_() for x in leaves)
    out, lse = _reference.forward(q, k, v, cu_q, cu_k, causal, 0.3)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def inputs(size: int) -> tuple[Tensor, ...]:
    tokens_q, tokens_k = sum(LENGTHS), sum(MORE_KEYS)
    shapes = ((tokens_q, 4), (tokens_k, 2), (tokens_k, 2), (tokens_q, 4))
    q, k, v, grad = (torch.randn(*shape, size) for shape in shapes)
    return q, k, v, grad


def instruction_sets() -> list[str]:
    if not native.loaded():
        return []
    named = {"avx512": torch.cpu._is_avx512_supported, "avx2": torch.cpu._is_avx2_supported}
    return ["baseline", *(name for name, supported in named.items() if supported())]


# every set that this processor can run, not only the best one
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("causal", [False, True])
# less than a vector; no whole number of vectors; several tiles wide
@pytest.mark.parametrize("size", [3, 20, 136])
def test_every_instruction_set(isa, causal, size, tmp_path):
    tensors, layout = inputs(size), (boundaries(LENGTHS), boundaries(MORE_KEYS), causal)
    torch.save((tensors, layout), tmp_path / "in")
    code = f"""
import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_varlen_attention import attention, native
assert native.loaded() and torch.ops.apical.cpu_isa() == {isa!r}
tensors, layout = torch.load({str(tmp_path / "in")!r})
torch.save(attention(tensors, *layout), {str(tmp_path / "out")!r})
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "APICAL_ISA": isa}, check=True)
    actual, exact = torch.load(tmp_path / "out"), truth(tensors, *layout)
    for ours, same in zip(actual, exact, strict=True):
        torch.testing.assert_close(ours.double(), same, rtol=1e-4, atol=2e-5)


@needs_library
def test_threads_change_no_bit():
    tensors, layout = inputs(32), (boundaries(LENGTHS), boundaries(MORE_KEYS), True)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(attention(tensors, *layout))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
@pytest.mark.parametrize("masked", [(0, 3), (0, 600), (520, 600)])
def test_scores_of_minus_infinity_weigh_nothing(masked):
    # in part of a block, in all of the first one, and in the second one
    q, k, v, _ = inputs(4)
    q, k = torch.ones_like(q[:1]), torch.ones_like(k[:700])
    k[slice(*masked)] = -torch.inf
    out, lse = ops.forward(q, k, v[:700], boundaries((1,)), boundaries((700,)), False, 1.0)
    seen = torch.ones(700, dtype=torch.bool)
    seen[slice(*masked)] = False
    exact = v[:700][seen].mean(0).repeat_interleave(2, 0)
    torch.testing.assert_close(out[0], exact, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(lse).all()


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(4, 2, 8).double()}, "q must be float32"),
        ({"k": torch.ones(4, 8, 2).mT}, "k must be .* contiguous channels"),
        ({"documents": torch.tensor([[0, 5, 0, 4]])}, "documents must lie inside"),
        ({"documents": torch.tensor([[0, 4]])}, r"contiguous \(N, 4\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_checks_at_the_door(change, message):
    one = torch.ones(4, 2, 8)
    good = {"q": one, "k": one, "v": one, "documents": torch.tensor([[0, 4, 0, 4]])}
    out, lse = torch.empty_like(one), torch.empty(4, 2)
    assert native.loaded()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.apical.varlen_attention_cpu_forward(
            *(good | change).values(), True, 1.0, out, lse
        )


def test_larger_heads_and_float64_are_left_to_torch():
    assert not _cpu.takes(torch.ones(1, 1, 257))
    assert not _cpu.takes(torch.ones(1, 1, 8, dtype=torch.float64))
