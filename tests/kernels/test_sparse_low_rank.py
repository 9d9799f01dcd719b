"""Sparse plus low-rank products against the whole weight in float64."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from apical import Support, sparse_low_rank

from .sparse_low_rank_cases import (
    IMPLEMENTATIONS,
    NAMES,
    SUPPORTS,
    M,
    N,
    Operands,
    as_leaves,
    by_hand,
    force,
    fused,
    in_parts,
    sample,
    with_grads,
)

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = pytest.mark.parametrize("kind", SUPPORTS)


Hold = Callable[..., None]


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def plain(request, monkeypatch) -> Callable[[Operands, Support], Tensor]:
    """What the implementation computes, in plain PyTorch."""
    force(request.param, monkeypatch)
    return in_parts if request.param == "native" else by_hand


@pytest.fixture
def hold(check_error, plain) -> Hold:
    """Hold the product and all its gradients to float64 and to plain PyTorch."""
    return partial(_hold, check_error, plain)


def _hold(check_error, plain, draws: list[Operands], support: Support, **options: bool) -> None:
    results = zip(*(_results(plain, drawn, support, options) for drawn in draws), strict=True)
    for name, tensors in zip(("output", *NAMES), results, strict=False):
        found = (torch.stack(parts) for parts in zip(*tensors, strict=True))
        check_error(*found, f"{support.kind} {name}")


def _results(
    plain, operands: Operands, support: Support, options: dict[str, bool]
) -> Iterator[tuple[Tensor, ...]]:
    """The product and every gradient: ours, in float64, and in plain PyTorch."""
    upstream = torch.randn(*operands.input.shape[:-1], support.out_features)
    upstream = upstream.to(operands.input.dtype)
    exact = as_leaves(operands, torch.float64)
    truth = with_grads(lambda o: by_hand(o, support), exact, upstream)
    ours = with_grads(lambda o: fused(o, support, **options), operands, upstream)
    usual = with_grads(lambda o: plain(o, support), operands, upstream)
    return zip(ours, truth, usual, strict=True)


# one row; one less and one more than two vectors' blocks of 64
@KINDS
@pytest.mark.parametrize("T", [1, 127, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_the_whole_weight_in_float64(T, dtype, kind, hold):
    support = SUPPORTS[kind](N, M)
    # of a single row there are so few numbers that one lucky rounding of PyTorch's would decide
    hold([sample(support, T, dtype=dtype) for _ in range(8 if T == 1 else 1)], support)


@pytest.mark.parametrize("kind", ["uniform", "grouped"])
def test_float16_is_taken(kind, hold):
    support = SUPPORTS[kind](N, M)
    hold([sample(support, 33, dtype=torch.float16)], support)


# without a bias nothing initialises the output; recomputed: another way to b's gradient
@KINDS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_options(bias, recompute, kind, hold):
    support = SUPPORTS[kind](N, M)
    hold([sample(support, 66, bias=bias)], support, recompute_hidden=recompute)


# one row, one column, one entry; a block larger than the weight; ranks beyond both sides
@pytest.mark.parametrize(
    "support",
    [
        Support("uniform", 1, 40, 0.2),
        Support("uniform", 40, 1, 0.2),
        Support("uniform", 1, 1, 1.0),
        Support("grouped", 5, 33, 0.6),
        Support("grouped", 5, 3, 1.0, block=(2, 1)),
        Support("nm", 3, 4, 0.25, block=(1, 4)),
    ],
    ids=str,
)
def test_small_weights(support, hold):
    hold([sample(support, 19, rank=50)], support)


# sizes, density, block, rank and rows by the seed: whatever the cases above did not think of
@pytest.mark.parametrize("seed", range(24))
def test_weights_of_any_shape(seed, hold):
    torch.manual_seed(seed)
    draw = [int(torch.randint(1, high, ())) for high in (400, 400, 70, 150, 150, 40)]
    n, m, rank, T, rows, columns = draw
    density, kind = torch.rand(()).item() * 0.5 + 0.01, ("uniform", "regular", "grouped")[seed % 3]
    block = (rows, min(columns, m)) if kind == "grouped" else (0, 0)
    # narrow weights store an entry all the same
    density = max(density, 1.01 * max(block[1], 1) / m if kind == "grouped" else 1.01 / (n * m))
    support = Support(kind, n, m, min(density, 1.0), seed, block)
    hold([sample(support, T, rank=rank, bias=seed % 2 == 0)], support)


@KINDS
def test_each_gradient_alone_is_the_one_among_all(kind):
    support = SUPPORTS[kind](N, M)
    operands, upstream = sample(support, 40), torch.randn(40, N)
    _, *together = with_grads(lambda o: fused(o, support), operands, upstream)
    for i, (name, expected) in enumerate(zip(NAMES, together, strict=True)):
        alone = [t.detach() for t in operands if t is not None]
        leaf = alone[i].requires_grad_()
        fused(Operands(*alone), support).backward(upstream)
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, expected), name
        assert all(t.grad is None for j, t in enumerate(alone) if j != i), name


# strides of every operand: columns apart, rows that all are one, rows further apart than wide
@pytest.mark.parametrize("kind", ["uniform", "grouped"])
@pytest.mark.parametrize("case", ["transposed", "expanded", "sliced"])
def test_operands_of_any_strides(case, kind, plain, check_error):
    support = SUPPORTS[kind](N, M)
    stride = {
        "transposed": lambda t: t.t().contiguous().t() if t.ndim == 2 else t.repeat(2)[: len(t)],
        "expanded": lambda t: t[:1].expand_as(t),
        "sliced": lambda t: torch.stack([t, -t], -1).flatten(-2)[..., ::2],
    }[case]
    leaves = sample(support, 45)
    upstream = stride(torch.randn(45, N))
    exact = as_leaves(leaves, torch.float64)
    results = [
        with_grads(lambda o: by_hand(_strided(o, stride), support), exact, upstream),
        with_grads(lambda o: fused(_strided(o, stride), support), leaves, upstream),
        with_grads(lambda o: plain(_strided(o, stride), support), leaves, upstream),
    ]
    for name, truth, ours, usual in zip(("output", *NAMES), *results, strict=True):
        check_error(ours, truth, usual, f"{case} {name}")


def _strided(operands: Operands, stride) -> Operands:
    return Operands(*(stride(t) for t in operands))


@pytest.mark.parametrize("kind", ["uniform", "grouped"])
def test_leading_axes(kind):
    support = SUPPORTS[kind](N, M)
    operands = sample(support, 2, 3, 5)
    flat = operands._replace(input=operands.input.detach().view(30, M).requires_grad_())
    upstream = torch.randn(2, 3, 5, N)
    shaped = with_grads(lambda o: fused(o, support), operands, upstream)
    for a, e in zip(
        shaped, with_grads(lambda o: fused(o, support), flat, upstream.view(30, N)), strict=True
    ):
        assert torch.equal(a.flatten(), e.flatten())
    one = fused(operands._replace(input=operands.input[0, 0, 0]), support)
    assert one.shape == (N,)
    # sums of one row may be taken in another order
    torch.testing.assert_close(one, shaped[0][0, 0, 0], rtol=1e-5, atol=1e-4)


# no rows, in one axis and in two
@KINDS
@pytest.mark.parametrize("leading", [(0,), (3, 0)])
def test_no_rows_give_no_rows_and_gradients_of_zero(leading, kind):
    support = SUPPORTS[kind](N, M)
    output, *grads = with_grads(
        lambda o: fused(o, support), sample(support, *leading), torch.empty(*leading, N)
    )
    assert output.shape == (*leading, N)
    assert grads[0].shape == (*leading, M)
    assert [g.shape for g in grads[1:]] == [(7, M), (N, 7), (support.stored,), (N,)]
    assert all(bool((g == 0).all()) for g in grads[1:])


@KINDS
def test_nan_stays_in_its_row(kind):
    support = SUPPORTS[kind](N, M)
    operands = sample(support, 70)
    x = operands.input.detach().clone()
    x[33] = torch.nan
    output = fused(operands._replace(input=x), support)
    assert output[33].isnan().all()
    assert output[torch.arange(70) != 33].isfinite().all()


@KINDS
def test_nan_in_a_value_reaches_its_row_and_its_column(kind):
    support = SUPPORTS[kind](N, M)
    operands, which = sample(support, 70), support.stored // 2
    row, column = divmod(int(support.flat()[which]), M)
    with torch.no_grad():
        operands.values[which] = torch.nan
    output, of_input, *others = with_grads(
        lambda o: fused(o, support), operands, torch.randn(70, N)
    )
    assert torch.equal(output.isnan().nonzero()[:, 1].unique(), torch.tensor([row]))
    assert output[:, row].isnan().all()
    assert torch.equal(of_input.isnan().nonzero()[:, 1].unique(), torch.tensor([column]))
    assert of_input[:, column].isnan().all()
    assert all(t.isfinite().all() for t in others)


@KINDS
def test_the_same_bits_twice(kind):
    support = SUPPORTS[kind](N, M)
    operands, upstream = sample(support, 129), torch.randn(129, N)
    first, second = (with_grads(lambda o: fused(o, support), operands, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_order_of_values_is_that_of_the_positions():
    # the weight, read off the product with the identity
    for kind, make in SUPPORTS.items():
        support = make(N, M)
        values = torch.arange(1.0, support.stored + 1)
        zeros = torch.zeros(1, M), torch.zeros(N, 1)
        weight = sparse_low_rank(torch.eye(M), *zeros, values, support).t()
        assert torch.equal(weight.flatten()[support.flat()], values), kind
        assert torch.equal(weight != 0, support.mask()), kind


def _exact_gradient(operands: Operands, support: Support) -> list[Tensor]:
    exact = as_leaves(operands, torch.float64)
    return with_grads(lambda o: by_hand(o, support), exact, torch.ones(64, support.out_features))


def test_under_autocast_operands_are_cast_as_those_of_linear():
    support = SUPPORTS["uniform"](N, M)
    operands = sample(support, 64)
    upstream = torch.ones(64, N)
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_grads(lambda o: fused(o, support), operands, upstream)
    halves = Operands(*(t.detach().bfloat16().requires_grad_() for t in operands if t is not None))
    expected = with_grads(lambda o: fused(o, support), halves, upstream)
    assert ours[0].dtype == torch.bfloat16
    for a, e in zip(ours, expected, strict=True):
        assert torch.equal(a, e.to(a.dtype))
    assert all(grad.dtype == torch.float32 for grad in ours[1:])
    for name, a, e in zip(NAMES, ours[1:], _exact_gradient(operands, support)[1:], strict=True):
        assert (a - e).norm() <= 1e-2 * e.norm(), name
