"""The lengths, head sizes and empty documents that flash-attn's own tests go through."""

import functools

import pytest
import torch

from . import varlen_attention_definition as spec

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=spec.IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    return spec.force(request.param, monkeypatch)


@functools.cache
def expected(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], causal: bool, dtype: torch.dtype,
    heads: int, kv_heads: int, dim: int, values: int,
) -> tuple[dict[str, torch.Tensor], spec.Results, spec.Results]:  # fmt: skip
    """Return inputs, what is exact for them, and what plain PyTorch makes of them."""
    sizes = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "values": values}
    tensors = spec.inputs(sum(lengths_q), sum(lengths_k), dtype=dtype, **sizes)
    define, options = spec.defined(lengths_q, lengths_k), {"causal": causal}
    exact = spec.run(define, tensors, options, torch.float64, with_lse=False)
    plains = [
        spec.run(attend, tensors, options, with_lse=False)
        for attend in (spec.torchs(lengths_q, lengths_k), define)
    ]
    # errors of a few roundings are luck: torch's fused attention or the formula, the worse
    worse = {
        name: max((plain[name] for plain in plains), key=lambda x: (x - exact[name]).abs().max())
        for name in ("out", "q.grad", "k.grad", "v.grad")
        if exact[name].numel()
    }
    return tensors, exact, worse


def check(
    check_error, lengths_q, lengths_k, *, causal, dtype, heads=2, kv_heads=1, dim=32, values=0
):
    """Hold one case against float64, its rows that see no key included."""
    case = lengths_q, lengths_k, causal, dtype, heads, kv_heads, dim, values or dim
    tensors, exact, plain = expected(*case)
    attend = spec.packed(lengths_q, lengths_k)
    actual = spec.run(attend, tensors, {"causal": causal}, with_lse=False)
    for name, value in plain.items():
        check_error(actual[name], exact[name], value, name)


# flash-attn's list: one query or key, far from square, at and beside its blocks, many blocks
PAIRS = [
    (511, 1), (3, 513), (64, 128), (113, 203), (128, 217), (108, 256), (307, 256), (640, 128),
    (1023, 1024), (1024, 1023),
]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_lengths(check_error, implementation, pair, causal):
    # with a neighbour, so that the document begins anywhere
    lengths = (3, pair[0]), (5, pair[1])
    check(check_error, *lengths, causal=causal, dtype=torch.float32)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_lengths_in_half_precision(check_error, implementation, pair):
    lengths = (3, pair[0]), (5, pair[1])
    check(check_error, *lengths, causal=True, dtype=torch.bfloat16)


# its long ones, with one head: the definition has all scores in memory
@pytest.mark.parametrize(("length", "causal"), [(2048, False), (4224, True)])
def test_long_documents(check_error, implementation, length, causal):
    one = (length,)
    check(check_error, one, one, causal=causal, dtype=torch.float32, heads=1)


# (H, K): every head its own keys, four heads to a key head, one for all of an odd number
HEADS = {"mha": (2, 2), "gqa": (8, 2), "mqa": (3, 1)}
# flash-attn's sizes; and none of a vector, values of another size as in latent attention, one
SIZES = [
    (8, 8), (16, 16), (32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256),
    (59, 59), (192, 128), (40, 256), (1, 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_head_sizes(check_error, implementation, heads, size, dtype):
    count, kv_count = HEADS[heads]
    # equal and unequal lengths, and both sides of 48 and 64 rows
    check(
        check_error,
        (49, 0, 64, 5),
        (49, 3, 64, 70),
        causal=True,
        dtype=dtype,
        heads=count,
        kv_heads=kv_count,
        dim=size[0],
        values=size[1],
    )


def lengths_of(mode: str, batch: int, longest: int) -> list[int]:
    draw = torch.Generator().manual_seed(batch)
    if mode == "full":
        return [longest] * batch
    shortest = 1 if mode == "random" else max(1, longest // 3)
    return torch.randint(shortest, longest + 1, (batch,), generator=draw).tolist()


def emptied(lengths: list[int]) -> tuple[int, ...]:
    """Return lengths of which every fifth and the last are 0."""
    last = len(lengths) - 1
    return tuple(0 if n % 5 == 0 or n == last else length for n, length in enumerate(lengths))


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("empty", ["none", "queries", "keys", "both"])
@pytest.mark.parametrize("mode", ["random", "third", "full"])
# one document, and more than a task per thread
@pytest.mark.parametrize("batch", [1, 20])
def test_batches_with_empty_documents(check_error, implementation, batch, mode, empty, causal):
    lengths_q, lengths_k = (lengths_of(mode, batch, longest) for longest in (23, 40))
    check(
        check_error,
        emptied(lengths_q) if empty in ("queries", "both") else tuple(lengths_q),
        emptied(lengths_k) if empty in ("keys", "both") else tuple(lengths_k),
        causal=causal,
        dtype=torch.float32,
    )
