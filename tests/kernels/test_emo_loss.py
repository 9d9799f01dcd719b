"""The earth mover's loss against the released formulas, written out in float64."""

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from apical.kernels.emo_loss import EmoLossOutput, emo_loss, ops
from apical.kernels.emo_loss._reference import parts
from apical.kernels.emo_loss._rules import Rules

labelled_rows = importlib.import_module("apical.kernels._common.labelled_rows")

IGNORE = -100
# every rule at once, so that each must be in its right place
BUSY: dict[str, Any] = {"z_loss": 1e-2, "softcap": 5.0, "logit_scale": 0.7}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 64 rows, so that small inputs have several."""
    monkeypatch.setattr(labelled_rows, "_CHUNK_ROWS", (64, 64))


def leaf(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor.detach().to(dtype).clone().requires_grad_()


def sample(T: int, V: int, H: int = 24, D: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    target = torch.randint(0, V, (T,))
    target[torch.rand(T) < 0.3] = IGNORE
    # the cost's width is its own
    return torch.randn(T, H), torch.randn(V, H) * 2 * H**-0.5, target, torch.randn(V, D)


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def released(
    x: Tensor, W: Tensor, y: Tensor, cost: Tensor, *, mode: int = 1, clamp: float | None = 3.0,
    exclude_own_mass: bool = False, z_loss: float = 0.0, softcap: float | None = None,
    logit_scale: float = 1.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """What the released code computes, with every matrix whole, and our extra rules."""
    z = logit_scale * x @ W.t()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    valid = (y != IGNORE).to(z.dtype)
    labels = torch.where(y == IGNORE, 0, y)
    one_hot = F.one_hot(labels, len(W)).to(z.dtype)
    E = cost / cost.norm(dim=1, keepdim=True)
    q = z.softmax(1)
    q = q - (q * one_hot).detach() if exclude_own_mass else q
    emo = 1 - ((one_hot @ E) * (q @ E)).sum(1)
    nll = F.cross_entropy(z, labels, reduction="none")
    ratio = (nll / (emo + 1e-10)).detach()
    ratio = ratio if clamp is None else ratio.clamp(max=clamp)
    loss = (ratio * emo + nll) / 2
    if mode == 2:
        loss = (emo / (nll + 1e-10)).detach() * nll + emo
    loss = loss + z_loss * z.logsumexp(1) ** 2
    total = (loss * valid).sum()
    return total / valid.sum().clamp(min=1) if reduction == "mean" else total


VARIANTS: dict[str, dict[str, Any]] = {
    "as-released": {},
    "mode-2": {"mode": 2},
    "no-clamp": {"clamp": None},
    "small-clamp": {"clamp": 0.5},  # one that most ratios exceed
    "own-mass": {"exclude_own_mass": True},
    "own-mass-mode-2": {"exclude_own_mass": True, "mode": 2},
    "busy": BUSY,
    "busy-mode-2-sum": BUSY | {"mode": 2, "reduction": "sum"},
}


# one token, and both sides of a chunk boundary; vocabularies: no multiple of a vector, larger
@pytest.mark.usefixtures("small_chunks", "one_thread")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize(("T", "V"), [(1, 31), (64, 31), (65, 31), (130, 1003)])
def test_matches_the_released_formulas_in_float64(T, V, impl, variant):
    x, W, y, E = sample(T, V)
    y[0] = 3
    exact, ours = ((leaf(x, d), leaf(W, d)) for d in (torch.float64, torch.float32))
    truth = released(*exact, y, E.double(), **VARIANTS[variant])
    result = emo_loss(*ours, y, E, impl=impl, **VARIANTS[variant])
    assert result.loss.item() == pytest.approx(truth.item(), rel=1e-6)
    (result.loss * 0.7).backward()
    (truth * 0.7).backward()
    for name, a, e in zip(("input", "weight"), ours, exact, strict=True):
        assert relative(grad_of(a), grad_of(e)) <= 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["as-released", "busy"])
def test_half_precision_rounds_a_gradient_once(dtype, variant):
    x, W, y, E = sample(130, 203)
    x, W, E = x.to(dtype), W.to(dtype), E.to(dtype)
    exact, ours = (leaf(x, torch.float64), leaf(W, torch.float64)), (leaf(x, dtype), leaf(W, dtype))
    truth = released(*exact, y, E.double(), **VARIANTS[variant])
    result = emo_loss(*ours, y, E, **VARIANTS[variant])
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(truth.item(), rel=1e-6)
    result.loss.backward()
    truth.backward()
    for a, e in zip(ours, exact, strict=True):
        assert grad_of(a).dtype == dtype
        assert relative(grad_of(a), grad_of(e)) <= 3e-3


def test_mixed_dtypes_as_under_autocast():
    x, W, y, _ = sample(50, 31)
    x = x.bfloat16()
    exact, ours = (leaf(x, torch.float64), leaf(W, torch.float64)), (leaf(x, x.dtype), leaf(W))
    released(*exact, y, W.double()).backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = emo_loss(*ours, y).loss
    loss.backward()
    assert relative(grad_of(ours[0]), grad_of(exact[0])) <= 3e-3
    assert relative(grad_of(ours[1]), grad_of(exact[1])) <= 1e-5


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradcheck_of_the_reference(softcap):
    # of its parts: the ratio has no gradient, so the whole is no function's derivative
    rules = Rules(1, 3.0, False, 0.0, softcap, 0.8)
    x, W, y, E = sample(5, 7, H=3)
    y = y.clamp(min=0)
    leaves = (leaf(x, torch.float64), leaf(W, torch.float64))

    def values(x: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return parts(x, W, E.double(), y, rules)

    assert torch.autograd.gradcheck(values, leaves)
    assert torch.autograd.gradgradcheck(values, leaves)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_the_parts_are_those_of_the_formulas(impl):
    x, W, y, E = sample(40, 31)
    result = emo_loss(x, leaf(W), y, E, z_loss=1e-2, impl=impl)
    assert isinstance(result, EmoLossOutput)
    assert [part.requires_grad for part in result] == [True, False, False, False, False]
    rows, z = (y != IGNORE).nonzero().squeeze(1), x.double() @ W.double().t()
    C = F.cosine_similarity(E.double()[y[rows], None], E.double()[None], dim=2)
    distance = (z[rows].softmax(1) * (1 - C)).sum(1)
    own = z[rows].softmax(1)[range(len(rows)), y[rows]]
    for got, truth in (
        (result.nll, F.cross_entropy(z[rows], y[rows], reduction="none")),
        (result.lse, z[rows].logsumexp(1)),
        (result.distance, distance),
        (emo_loss(x, W, y, E, exclude_own_mass=True, impl=impl).distance, distance + own),
    ):
        torch.testing.assert_close(got[rows].double(), truth, rtol=1e-5, atol=1e-7)
        assert not got[y == IGNORE].any()
    z_part = 1e-2 * (result.lse**2).sum() / len(rows)
    torch.testing.assert_close(result.z, z_part)


def test_the_released_modes_have_simple_values():
    # without clamp mode 1 is the nll, mode 2 twice the distance: the ratio cancels in the value
    x, W, y, E = sample(40, 31)
    N = (y != IGNORE).sum()
    one, two = emo_loss(x, W, y, E, clamp=None), emo_loss(x, W, y, E, mode=2)
    torch.testing.assert_close(one.loss, one.nll.sum() / N)
    torch.testing.assert_close(two.loss, 2 * two.distance.sum() / N)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_the_current_head_is_the_default_cost_and_gets_no_gradient_from_it(impl):
    x, W, y, _ = sample(40, 31)
    default, given = leaf(W), leaf(W)
    frozen = leaf(W)
    emo_loss(x, default, y, impl=impl).loss.backward()
    emo_loss(x, given, y, frozen, impl=impl).loss.backward()
    assert torch.equal(grad_of(default), grad_of(given))
    assert frozen.grad is None


def test_a_target_almost_certain_keeps_its_digits():
    # p_y = 1 - 4e-12: 1 - p and lse - logit would be rounding in float32
    x, W, E = torch.ones(1, 1), torch.tensor([[28.0], [0.5], [0.0]]), torch.randn(3, 4)
    y = torch.zeros(1, dtype=torch.long)
    exact, ours = (leaf(x, torch.float64), leaf(W, torch.float64)), (leaf(x), leaf(W))
    z = exact[0] @ exact[1].t()
    rest = (z[0, 1:] - z[0, 0]).exp()
    cost = 1 - F.cosine_similarity(E[1:].double(), E[:1].double())
    nll, emo = rest.sum().log1p(), (rest * cost).sum() / (1 + rest.sum())
    truth = ((nll / (emo + 1e-10)).detach().clamp(max=3) * emo + nll) / 2
    result = emo_loss(*ours, y, E)
    assert result.loss.item() == pytest.approx(truth.item(), rel=1e-5)
    result.loss.backward()
    truth.backward()
    for a, e in zip(ours, exact, strict=True):
        assert relative(grad_of(a), grad_of(e)) <= 1e-5


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("own", [False, True])
def test_degenerate_costs_are_defined(impl, mode, own):
    x, W, y, E = sample(20, 31)
    options = {"mode": mode, "exclude_own_mass": own, "impl": impl}
    # rounding takes the cosine of parallel rows above 1
    costs = {"parallel rows": E[:1] * torch.rand(31, 1), "zero rows": torch.zeros_like(E)}
    for name, cost in costs.items():
        leaves = (leaf(x), leaf(W))
        result = emo_loss(*leaves, y, cost, **options)
        result.loss.backward()
        for tensor in (*result, *(grad_of(t) for t in leaves)):
            assert bool(tensor.isfinite().all()), name
        assert bool((result.distance >= 0).all()), name
    # a row of zeros is at distance 1 from every other, 0 from itself
    if not own:
        apart = emo_loss(x, W, y, torch.zeros_like(E), **options)
        expected = torch.where(y == IGNORE, 0.0, 1 - (-apart.nll).exp())
        torch.testing.assert_close(apart.distance, expected)


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("mode", [1, 2])
def test_a_vocabulary_of_one_costs_nothing(impl, mode):
    x, W = torch.randn(3, 4, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    result = emo_loss(x, W, torch.zeros(3, dtype=torch.long), mode=mode, impl=impl)
    result.loss.backward()
    assert result.loss.item() == 0
    assert not grad_of(x).any()
    assert not grad_of(W).any()


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("T", [0, 6])  # no rows at all, and none with a label
def test_nothing_to_learn_is_zero(impl, T):
    x, W = torch.randn(T, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    result = emo_loss(x, W, torch.full((T,), IGNORE), z_loss=1.0, num_items=0, impl=impl)
    result.loss.backward()
    for tensor in (*result, grad_of(x), grad_of(W)):
        assert not tensor.any()


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_ignored_rows_may_hold_nan(impl):
    x, W, y, E = sample(40, 31)
    y[5] = -7
    y[y == IGNORE] = -7
    results = []
    for filler in (0.0, float("nan")):
        leaves = (leaf(torch.where((y == -7)[:, None], filler, x)), leaf(W))
        loss = emo_loss(*leaves, y, E, ignore_index=-7, z_loss=1e-3, impl=impl).loss
        loss.backward()
        results.append((loss.detach(), *(grad_of(t) for t in leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert not results[1][1][y == -7].any()


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
def test_num_items_makes_accumulation_exact(as_tensor):
    # micro-batches of unequal size, divided by the count of the whole batch
    x, W, y, E = sample(60, 31)
    whole, pieces = leaf(W), leaf(W)
    one = emo_loss(x, whole, y, E, z_loss=1e-3)
    one.loss.backward()
    count, total = (y != IGNORE).sum(), 0.0
    for rows in (slice(0, 7), slice(7, 60)):
        items = count if as_tensor else int(count)
        piece = emo_loss(x[rows], pieces, y[rows], E, z_loss=1e-3, num_items=items)
        piece.loss.backward()
        total += piece.loss.item()
    assert total == pytest.approx(one.loss.item(), rel=1e-6)
    torch.testing.assert_close(grad_of(pieces), grad_of(whole), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("small_chunks")
def test_runs_are_bitwise_equal_and_a_graph_may_be_kept():
    x, W, y, E = sample(300, 257)
    runs = []
    for _ in range(2):
        leaves = (leaf(x), leaf(W))
        loss = emo_loss(*leaves, y, E, **BUSY).loss
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        for gradient in first:
            runs.append((loss, gradient.clone()))
            gradient.zero_()
        runs += [(loss, gradient) for gradient in torch.autograd.grad(loss, leaves)]
    for other in runs[2::2]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    for other in runs[3::2]:
        assert all(torch.equal(a, b) for a, b in zip(runs[1], other, strict=True))


def test_float32_gradients_are_handed_over_without_a_copy(monkeypatch):
    addresses: list[int] = []
    forward = ops.forward

    def watch(*args: Any) -> Any:
        made = forward(*args)
        # the addresses alone: who else holds a gradient forces a copy
        addresses.extend(gradient.data_ptr() for gradient in made[-2:])
        return made

    monkeypatch.setattr(ops, "forward", watch)
    x, W, y, E = sample(40, 31)
    leaves = (leaf(x), leaf(W))
    emo_loss(*leaves, y, E).loss.backward()
    assert [grad_of(t).data_ptr() for t in leaves] == addresses


@pytest.mark.parametrize("frozen", ["input", "weight", "both"])
def test_frozen_parts(frozen):
    x, W, y, E = sample(50, 31)
    full, leaves = (leaf(x), leaf(W)), (leaf(x), leaf(W))
    truth = emo_loss(*full, y, E).loss
    truth.backward()
    leaves[0].requires_grad_(frozen not in ("input", "both"))
    leaves[1].requires_grad_(frozen not in ("weight", "both"))
    loss = emo_loss(*leaves, y, E).loss
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    if frozen == "both":
        assert not loss.requires_grad
        return
    loss.backward()
    for part, expected in zip(leaves, full, strict=True):
        if part.requires_grad:
            assert torch.equal(grad_of(part), grad_of(expected))
        else:
            assert part.grad is None


def test_layouts_and_leading_axes():
    x, W, y, E = sample(48, 31)
    expected = emo_loss(x, W, y, E)
    columns, wide = x.t().contiguous().t(), torch.cat([W, W], 1)[:, : W.shape[1]]
    strided = emo_loss(columns, wide, y, E)
    batched = emo_loss(x.view(2, 4, 6, -1), W, y.view(2, 4, 6), E)
    for a, b, c in zip(expected, strided, batched, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(c, a, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "none"}, "reduction must be one of .*, got 'none'"),
        ({"impl": "triton"}, "impl must be 'fused' or 'reference', got 'triton'"),
        ({"mode": 3}, "mode must be 1 or 2, got 3"),
        ({"clamp": 0.0}, "clamp must be a finite number > 0, or None, got 0.0"),
        ({"softcap": float("nan")}, "softcap must be a finite number > 0, or None, got nan"),
        ({"z_loss": -1.0}, "z_loss must be a finite number >= 0, got -1.0"),
        ({"logit_scale": float("inf")}, "logit_scale must be a finite number, got inf"),
        ({"num_items": -1}, "num_items must be a count of tokens, got -1"),
        ({"num_items": 3, "reduction": "sum"}, "num_items is what 'mean' divides by"),
        ({"num_items": torch.ones(2)}, "num_items must be one number"),
        ({"target": torch.zeros(5, dtype=torch.long)}, r"target \(5,\) and input \(4, 3\)"),
        ({"target": torch.zeros(4)}, "target must be int64, got torch.float32"),
        ({"target": torch.full((4,), 7)}, "label 7, but linear_weight has V=7 rows"),
        ({"linear_weight": torch.ones(7, 2)}, "input has H=3, an earlier argument has H=2"),
        ({"cost_weight": torch.ones(6, 5)}, "cost_weight has V=6, an earlier argument has V=7"),
        ({"input": torch.ones(4, 3).double()}, "input is torch.float64; impl='fused' takes"),
        ({"cost_weight": torch.ones(7, 5).long()}, "cost_weight is torch.int64; impl='fused'"),
        ({"input": torch.ones(4, 3, device="meta")}, "on one device, got meta and target on cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message):
    good = {
        "input": torch.ones(4, 3),
        "linear_weight": torch.ones(7, 3),
        "target": torch.zeros(4, dtype=torch.long),
        "cost_weight": torch.ones(7, 5),
    }
    with pytest.raises(ValueError, match=message):
        emo_loss(**(good | change))


def test_sharded_weights_are_refused():
    x, W, y, E = sample(4, 31)
    setattr(E, "full_tensor", lambda: E)  # noqa: B010 - what tells a DTensor apart
    with pytest.raises(NotImplementedError, match=r"cost_weight\.full_tensor\(\)"):
        emo_loss(x, W, y, E)


def test_second_derivative_of_the_fused_loss_is_refused():
    x, W, y, E = sample(4, 31)
    y[0], x = 1, leaf(x)
    loss = emo_loss(x, W, y, E).loss * torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False), (False, False)])
def test_opcheck(wanted):
    x, W, y, E = sample(9, 31)
    rules = Rules(1, 3.0, True, 1e-3, 5.0, 0.7)
    torch.library.opcheck(ops.forward, (x, W, E, y, (y != IGNORE).float(), *rules, *wanted))


def test_no_matrix_of_tokens_by_vocabulary(monkeypatch):
    # the two buffers of a chunk are all there is of size V
    monkeypatch.setattr(labelled_rows, "_CHUNK_ROWS", (8, 8))
    x, W, y, E = sample(400, 211, H=8)
    largest = 0
    original = torch.Tensor.new_empty

    def watch(self: Tensor, *size: Any, **options: Any) -> Tensor:
        nonlocal largest
        made = original(self, *size, **options)
        largest = max(largest, made.numel())
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", watch)
    emo_loss(leaf(x), leaf(W), y, E).loss.backward()
    assert largest == 2 * 8 * 211


def test_compile_is_the_first_call_of_a_process():
    code = """
import torch
from apical.kernels.emo_loss import emo_loss
def loss(x, W, y, E): return emo_loss(x, W, y, E, z_loss=1e-3, softcap=5.0)
fast = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
for n in (5, 9):
    x, W = torch.randn(n, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    y, E = torch.randint(0, 7, (n,)), torch.randn(7, 3); y[0] = -100
    for got, expected in zip(fast(x, W, y, E), loss(x, W, y, E)):
        torch.testing.assert_close(got, expected)
    got = torch.autograd.grad(fast(x, W, y, E).loss, (x, W))
    expected = torch.autograd.grad(loss(x, W, y, E).loss, (x, W))
    torch.testing.assert_close(got, expected)
print("ok")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "ok\n", run.stderr[-2000:]
