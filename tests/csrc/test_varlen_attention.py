"""The attention of the C++ library: every rule, on every instruction set, beyond one block."""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from attention_definition import UNBOUNDED, Batch, Rules, attention, documents, philox, truth

from apical.kernels._common import native

needs_library = pytest.mark.skipif(not native.loaded(), reason=native.status()[1])

# empty documents, one token, around a vector, and around one and two blocks of 512 keys
LENGTHS = (0, 1, 17, 300, 0, 513, 700)
# fewer and more keys than queries, across blocks
MORE_KEYS = (3, 2, 9, 511, 0, 1030, 600)
H, K = 4, 2


def batch(
    size: int = 20,
    value_size: int | None = None,
    lengths: tuple[int, ...] = LENGTHS,
    lengths_k: tuple[int, ...] = MORE_KEYS,
) -> Batch:
    E = size if value_size is None else value_size
    T, S = sum(lengths), sum(lengths_k)
    shapes = ((T, H, size), (S, K, size), (S, K, E), (T, H, E), (T, H))
    q, k, v, grad_out, grad_lse = (torch.randn(shape) for shape in shapes)
    return Batch(q, k, v, grad_out, grad_lse, lengths, lengths_k)


def every_rule() -> dict[str, Rules]:
    slopes, sinks = torch.tensor([0.5, 0.1, 0.02, 0.0]), torch.tensor([-torch.inf, -1.0, 0.5, 9.0])
    # a gain of 0 leaves a row without scores
    gain = (torch.rand(sum(LENGTHS), H) + 2) * (torch.rand(sum(LENGTHS), H) > 0.1)
    rules = {
        "full": Rules(),
        "causal": Rules(right=0),
        # narrower than a tile, and beyond a block of keys
        "narrow": Rules(left=3, right=1),
        "wide": Rules(left=600, right=0),
        "right": Rules(right=100),
        # what a Lambda mask sees beyond its window: in one vector, in two blocks
        "global": Rules(right=-30, limit=5),
        "global-wide": Rules(right=-30, limit=520),
        "softcap": Rules(right=0, transform="softcap", a=2.0),
        "alibi": Rules(alibi_slopes=slopes),
        "alibi-per-document": Rules(alibi_slopes=torch.rand(len(LENGTHS), H), right=0),
        "sinks": Rules(sinks=sinks, right=0),
        "softplus": Rules(transform="softplus", right=0, scale=2.0),
        "power": Rules(transform="power", gain=gain, a=3.0, b=1.0, left=100),
        "dropout": Rules(dropout=0.3, seed=2**40 + 5, right=0),
    }
    both = rules["power"]._replace(dropout=0.6, seed=-7, sinks=sinks, alibi_slopes=slopes / 20)
    return rules | {"many": both}


def assert_close(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        close = torch.isclose(value.double(), exact[name], rtol=1e-4, atol=3e-5)
        assert close.all(), (name, value[~close], exact[name][~close])


def instruction_sets() -> list[str]:
    if not native.loaded():
        return []
    named = {"avx512": torch.cpu._is_avx512_supported, "avx2": torch.cpu._is_avx2_supported}
    return ["baseline", *(name for name, supported in named.items() if supported())]


def on(isa: str, cases: list[tuple[Batch, Rules]], folder: Path) -> list[dict[str, Tensor]]:
    torch.save([(tuple(one), tuple(rules)) for one, rules in cases], folder / "in")
    code = f"""
import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r})
from attention_definition import Batch, Rules, attention
from apical.kernels._common import native
assert native.loaded() and torch.ops.apical.cpu_isa() == {isa!r}
cases = torch.load({str(folder / "in")!r})
torch.save([attention(Batch(*b), Rules(*r)) for b, r in cases], {str(folder / "out")!r})
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "APICAL_ISA": isa}, check=True)
    return torch.load(folder / "out")


@functools.cache
def cases_and_truths() -> list[tuple[tuple[Batch, Rules], dict[str, Tensor]]]:
    torch.manual_seed(0)
    # less than a vector; several tiles wide; values of another size; none, when only lse counts
    sizes = [(3, 3), (136, 136), (20, 7), (7, 40), (8, 0)]
    cases = [(batch(), rules) for rules in every_rule().values()]
    cases += [(batch(*size), Rules(right=right)) for size in sizes for right in (UNBOUNDED, 0)]
    return [(case, truth(*case)) for case in cases]


# every set that this processor can run, not only the best one
@pytest.mark.parametrize("isa", instruction_sets())
def test_every_rule_and_size_on_every_instruction_set(isa, tmp_path):
    cases, truths = zip(*cases_and_truths(), strict=True)
    for actual, exact in zip(on(isa, list(cases), tmp_path), truths, strict=True):
        assert_close(actual, exact)


# all lengths around tiles, vectors and blocks of rows
@needs_library
@pytest.mark.parametrize("rules", [Rules(), Rules(right=0), Rules(left=9, right=2)], ids=str)
def test_every_length(rules):
    lengths = (*range(1, 40), 95, 96, 97, 192, 193)
    case = batch(16, lengths=lengths, lengths_k=lengths)
    assert_close(attention(case, rules), truth(case, rules))


@needs_library
def test_without_gradient_of_lse():
    case = batch()._replace(grad_lse=None)
    assert_close(attention(case, Rules(right=0)), truth(case, Rules(right=0)))


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [20, 64])
def test_half_precision_is_rounded_once(dtype, size):
    case = batch(size)
    half = case._replace(**{name: getattr(case, name).to(dtype) for name in Batch._fields[:4]})
    wide = half._replace(**{name: getattr(half, name).float() for name in Batch._fields[:4]})
    actual, exact = attention(half, Rules(right=0)), attention(wide, Rules(right=0))
    assert torch.equal(actual["lse"], exact["lse"])
    assert torch.equal(actual["out"], exact["out"].to(dtype))
    # delta is of the rounded result
    for name in ("q", "k", "v"):
        error = (actual[name].float() - exact[name]).norm() / exact[name].norm()
        assert actual[name].dtype == dtype
        assert error < 2 * torch.finfo(dtype).eps


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_half_precision(dtype):
    # one key: the result is its value, with every bit pattern but those of NaN
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = bits.view(dtype)
    values = values[values == values].view(-1, 1, 1)
    one = torch.zeros(len(values), 1, 1, dtype=dtype)
    at = torch.arange(len(values))
    at = torch.stack([at, at + 1, at, at + 1, at], 1)
    out, lse = torch.empty_like(values), torch.empty(len(values), 1)
    op = torch.ops.apical.varlen_attention_cpu_forward
    op(one, one, values, at, None, None, None, *Rules().numbers(), out, lse)
    assert torch.equal(out, values)
    wide = torch.empty(len(values), 1, 1)
    op(one, one, values, at, None, None, None, *Rules().numbers(), wide, lse)
    assert torch.equal(wide, values.float())


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_the_nearest(dtype):
    # ordinary, subnormal, too large, halfway, and infinite numbers
    edge = torch.tensor([65519.0, 65520.0, 1e-45, 3e-8, 5.96e-8, 6.1e-5, torch.inf, 3.39e38])
    values = torch.cat([torch.randn(1000), torch.randn(1000) * 1e-5, edge, -edge]).view(-1, 1, 1)
    ties = (torch.arange(1, 4001) * 2 + 1).float().view(-1, 1, 1) / 4096 * 2.0
    values = torch.cat([values, ties])
    one, n = torch.zeros(len(values), 1, 1), torch.arange(len(values))
    at = torch.stack([n, n + 1, n, n + 1, n], 1)
    out, lse = torch.empty(values.shape, dtype=dtype), torch.empty(len(values), 1)
    op = torch.ops.apical.varlen_attention_cpu_forward
    op(one, one, values, at, None, None, None, *Rules().numbers(), out, lse)
    assert torch.equal(out, values.to(dtype))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def of_first_head(rules: Rules) -> Rules:
    slopes, sinks, gain = rules[:3]
    return rules._replace(
        alibi_slopes=None if slopes is None else slopes[:1],
        sinks=None if sinks is None else sinks[:1],
        gain=None if gain is None else gain[:, :1],
    )


@needs_library
@pytest.mark.parametrize("heads", [H, 1])
@pytest.mark.parametrize("name", ["full", "causal", "wide", "many"])
def test_threads_change_no_bit(heads, name):
    case, rules = batch(32), every_rule()[name]
    if heads == 1:
        # one long document and one head, which all threads share
        q, k, v, grad_out = (x[:, :1] for x in case[:4])
        grad_lse = None if case.grad_lse is None else case.grad_lse[:, :1]
        case = Batch(q, k, v, grad_out, grad_lse, (sum(LENGTHS),), (sum(MORE_KEYS),))
        rules = of_first_head(rules)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(attention(case, rules))
    torch.set_num_threads(before)
    assert all(same(results[0], other) for other in results[1:])


@needs_library
@pytest.mark.parametrize("name", ["full", "causal", "narrow", "power"])
def test_packed_is_alone_bit_by_bit(name):
    case, rules = batch(24), every_rule()[name]
    packed, row, key = attention(case, rules), 0, 0
    for T, S in zip(LENGTHS, MORE_KEYS, strict=True):
        rows, keys = slice(row, row + T), slice(key, key + S)
        parts = (case.q[rows], case.k[keys], case.v[keys], case.grad_out[rows])
        assert case.grad_lse is not None
        one = Batch(*parts, case.grad_lse[rows], (T,), (S,))
        gain = None if rules.gain is None else rules.gain[rows]
        alone = attention(one, rules._replace(gain=gain))
        of_rows = {n: x[keys if n in ("k", "v") else rows] for n, x in packed.items()}
        assert same(alone, of_rows)
        row, key = row + T, key + S


@needs_library
@pytest.mark.parametrize("name", ["causal", "narrow", "wide", "global", "power", "dropout"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_seen_changes_no_bit(name, bad):
    """A bad key reaches exactly the rows that see it, a bad row exactly the keys that it sees."""
    lengths = (40, 200, 30)
    case, rules = batch(20, lengths=lengths, lengths_k=lengths), every_rule()[name]
    rules = rules._replace(gain=None if rules.gain is None else rules.gain[: sum(lengths)])
    good, key, row = attention(case, rules), 40 + 101, 40 + 77
    at = torch.arange(200)
    sees = (at >= 101 - rules.right) & (at <= 101 + rules.left) & (rules.limit > 101)
    rows = torch.zeros(sum(lengths), dtype=torch.bool)
    rows[40:240] = sees
    for tensor in ("k", "v"):
        spoiled = getattr(case, tensor).clone()
        spoiled[key] = bad
        result = attention(case._replace(**{tensor: spoiled}), rules)
        for x in ("out", "q"):
            assert torch.equal(result[x][~rows], good[x][~rows])
    seen = (at >= 77 - rules.left) & (at <= 77 + rules.right) & (at < rules.limit)
    keys = torch.zeros(sum(lengths), dtype=torch.bool)
    keys[40:240] = seen
    for tensor in ("q", "grad_out"):
        spoiled = getattr(case, tensor).clone()
        spoiled[row] = bad
        result = attention(case._replace(**{tensor: spoiled}), rules)
        for x in ("k", "v"):
            assert torch.equal(result[x][~keys], good[x][~keys])
        others = torch.arange(sum(lengths)) != row
        assert torch.equal(result["out"][others], good["out"][others])


@needs_library
def test_strides_and_padding():
    case, rules = batch(20), Rules(right=0)
    padded = {}
    for name in Batch._fields[:4]:
        x = getattr(case, name)
        wide = torch.full((x.shape[1], x.shape[0], x.shape[2] + 3), torch.nan)
        wide[..., :-3] = x.transpose(0, 1)
        padded[name] = wide[..., :-3].transpose(0, 1)
    assert case.grad_lse is not None
    padded["grad_lse"] = case.grad_lse.T.contiguous().T
    assert same(attention(case._replace(**padded), rules), attention(case, rules))


@needs_library
@pytest.mark.parametrize("masked", [(0, 3), (0, 600), (520, 600), (0, 700)])
def test_scores_of_minus_infinity_weigh_nothing(masked):
    # in part of a block, in all of the first one, in the second one, in every one
    q, k, v = torch.ones(1, H, 4), torch.ones(700, K, 4), torch.randn(700, K, 4)
    k[slice(*masked)] = -torch.inf
    case = Batch(q, k, v, torch.ones(1, H, 4), None, (1,), (700,))
    result = attention(case, Rules(scale=1.0))
    kept = torch.ones(700, dtype=torch.bool)
    kept[slice(*masked)] = False
    exact = v[kept].mean(0) if kept.any() else torch.zeros(K, 4)
    torch.testing.assert_close(result["out"][0], exact.repeat_interleave(2, 0))
    assert torch.isfinite(result["lse"]).all() == kept.any()
    assert torch.isfinite(result["v"]).all()


@needs_library
def test_a_window_costs_what_it_sees():
    # 64 keys of 16,384: without skipping, 256 times the work
    one = torch.randn(2**14, 1, 64)
    case = Batch(one, one, one, one, None, (2**14,), (2**14,))
    start = time.process_time()
    attention(case, Rules(left=63, right=0))
    middle = time.process_time()
    attention(case, Rules(right=0))
    assert 10 * (middle - start) < time.process_time() - middle


def test_numbers_of_dropout():
    # known answers of Philox4x32-10, from the Random123 distribution
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox((zero, zero, zero), 0).item() == 0x6627E8D5


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(4, 2, 8).double()}, "q must be float32, bfloat16 or float16"),
        ({"k": torch.ones(4, 8, 2).mT}, "k must be .* contiguous channels"),
        ({"v": torch.ones(3, 2, 8)}, "v must be "),
        ({"documents": torch.tensor([[0, 5, 0, 4, 0]])}, "documents must lie inside"),
        ({"documents": torch.tensor([[0, 4, 2, 4, 0]])}, "first row of a document must see"),
        ({"documents": torch.tensor([[0, 4]])}, r"contiguous \(N, 5\)"),
        ({"left": -1}, "left must not be negative"),
        ({"limit": 0}, "limit must be positive"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"alibi_slopes": torch.ones(3)}, "alibi_slopes must be contiguous float32 with 2"),
        ({"sinks": torch.ones(2).double()}, "sinks must be"),
        ({"gain": torch.ones(3, 2)}, r"gain must be \(4, 2\) float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_checks_at_the_door(change, message):
    one = torch.ones(4, 2, 8)
    tensors = {"q": one, "k": one, "v": one, "documents": torch.tensor([[0, 4, 0, 4, 0]])}
    rules = Rules(right=0)._replace(**{n: x for n, x in change.items() if n in Rules._fields})
    tensors |= {name: x for name, x in change.items() if name in tensors}
    out, lse = torch.empty_like(one), torch.empty(4, 2)
    op = torch.ops.apical.varlen_attention_cpu_forward
    with pytest.raises(RuntimeError, match=message):
        op(*tensors.values(), *rules[:3], *rules.numbers(), out, lse)


def test_trims_documents_as_the_operators_ask():
    case = batch(1, lengths=(4, 2), lengths_k=(2, 3))
    assert documents(case, 0).tolist() == [[2, 4, 0, 2, 0], [4, 6, 2, 5, 1]]
