"""The filtered gradients of the Triton kernels: which tiles they leave out, and what it changes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from apical.kernels.linear_cross_entropy import _triton, _triton_filter, _triton_forward
from apical.kernels.linear_cross_entropy._rules import Rules

from .linear_cross_entropy_definition import PLAIN, Inputs, gradients
from .linear_cross_entropy_interpreted import (
    INTERPRETED,
    STORED,
    bfloat16_products,  # noqa: F401 - a fixture of every test
    case,
    relative,
    small_tiles,  # noqa: F401 - likewise
)

pytestmark = INTERPRETED

TILE = 32


@pytest.fixture(autouse=True)
def two_tiles_a_chunk(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(_triton_forward, "_CHUNK_ROWS", 2 * TILE)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is collected here: each chunk's tiles, 1 where they count."""
    found: list[Tensor] = []
    plain = _triton_filter.kept

    def noted(active: _triton_filter.Active) -> Any:
        found.append(active.flags.clone())
        return plain(active)

    monkeypatch.setattr(_triton_filter, "kept", noted)
    return found


def sided(*, push: float, dtype: torch.dtype = torch.float32, **options: Any) -> Inputs:
    """Return inputs of which the first tokens like other tiles of classes than the last ones."""
    inputs = case(tokens=120, classes=200, spread=0.5, dtype=dtype, **options)
    likes = torch.tensor([0, 1, -1, 1, -1, -1, 0]).repeat_interleave(TILE)[:200]
    inputs.linear_weight[:, 0] = likes
    inputs.input[:, 0] = torch.where(torch.arange(120) < 60, push, -push)
    # no token likes the last classes
    inputs.linear_weight[:, 1] = torch.where(torch.arange(200) < 192, 0.0, -2.0)
    inputs.input[:, 1] = push
    return inputs._replace(ids=inputs.ids % TILE)


def tiles_of(p: Tensor, ids: Tensor, least: float) -> Tensor:
    """Return the tiles with a label or with a softmax of at least `least`."""
    marked = (p >= least).scatter(1, ids, True)
    rows, columns = (-(-size // TILE) for size in p.shape)
    padded = torch.zeros(rows * TILE, columns * TILE, dtype=torch.bool)
    padded[: len(p), : p.shape[1]] = marked
    return padded.view(rows, TILE, columns, TILE).amax((1, 3))


def filtered(inputs: Inputs, rules: Rules, least: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return three gradients in float64 without the tiles, what may be missing, and the tiles."""
    x, w, bias, ids, shares, classes, token = inputs
    rows = token.nonzero().squeeze(1)
    x, w, ids, token = x[rows].double(), w.double(), ids[rows], token[rows].double()[:, None]
    s = x @ w.t() if bias is None else x @ w.t() + bias.double()
    s = rules.logit_scale * s
    z = rules.softcap * (s / rules.softcap).tanh() if rules.softcap else s
    p, lse = z.softmax(1), z.logsumexp(1, keepdim=True)
    u = torch.ones_like(s[:1]) if classes is None else classes.double()[None]
    u = u * rules.smoothing / len(w)
    shares = shares[rows].double()
    push = token * (shares.sum(1, keepdim=True) + u.sum() + 2 * rules.z_loss * lse)
    tiles = tiles_of(p, ids, least)
    kept = tiles.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)[: len(p), : len(w)]
    slope = 1 - (z / rules.softcap) ** 2 if rules.softcap else torch.ones_like(z)
    slope = slope * rules.logit_scale
    whole = slope * (push * p - token * u).scatter_add(1, ids, -token * shares)
    left = torch.where(kept, whole, -slope * token * u)
    grads = [torch.zeros(inputs.input.shape).double().index_put((rows,), left @ w)]
    grads += [left.t() @ x] + ([] if bias is None else [whole.sum(0)])
    # every softmax that is left out is below `least`
    missing = torch.where(kept, 0.0, (push * slope).abs() * least)
    return grads, missing, tiles


SMOOTH = PLAIN._replace(smoothing=0.2, z_loss=0.02)


@pytest.mark.parametrize(
    ("rules", "options"),
    [
        pytest.param(PLAIN, {}, id="plain"),
        # several labels of a token
        pytest.param(PLAIN, {"labels": 3}, id="soft"),
        pytest.param(PLAIN._replace(softcap=6.0, logit_scale=0.8), {"bias": True}, id="softcap"),
        # the evenly spread part of the label is in no tile, so it stays
        pytest.param(SMOOTH, {"bias": True, "weighted": True}, id="smoothing"),
    ],
)
def test_what_is_left_out_is_below_the_threshold(
    rules: Rules, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, counted: list[Tensor]
):
    # large, so that what is left out is far above rounding
    least = 8e-3
    monkeypatch.setattr(_triton_filter, "threshold", lambda dtype: least)
    inputs = sided(push=2.5, **options)
    wanted = True, True, inputs.linear_bias is not None
    fused = _triton.forward(*inputs, *rules, *wanted)
    assert not counted
    got = _triton.forward(*inputs, *rules, *wanted, filtered=True)
    exact = gradients(inputs, rules)[1]
    want, missing, tiles = filtered(inputs, rules, least)
    # tiles of rows past the last valid one count nowhere
    flags = torch.cat(counted).bool()
    assert torch.equal(flags[: len(tiles), : tiles.shape[1]], tiles)
    assert flags.sum() == tiles.sum()
    # two tiles of rows differ, and one tile of classes counts nowhere
    assert (tiles[0] != tiles[-1]).any()
    assert tiles.any(0).tolist() == [True] * 6 + [False]
    for one, other in zip(got[:5], fused[:5], strict=True):
        assert torch.equal(one, other)
    for actual, true in zip(got[5:], want, strict=False):
        assert relative(actual, true) <= 2e-6
    assert relative(got[5], exact[0]) > 1e-3
    assert relative(got[6], exact[1]) > 1e-3
    # the bound of the README
    rows = inputs.token_weight.nonzero().squeeze(1)
    x, w = inputs.input[rows].double(), inputs.linear_weight.double()
    lost = (got[5].double() - exact[0])[rows].norm(dim=1)
    assert (lost <= missing @ w.norm(dim=1) + 1e-5).all()
    lost = (got[6].double() - exact[1]).norm(dim=1)
    assert (lost <= missing.t() @ x.norm(dim=1) + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_peaked_softmax_leaves_most_tiles_out(dtype: torch.dtype, counted: list[Tensor]):
    # six in exp(24) of a class that is not liked
    inputs = sided(push=12.0, dtype=dtype, bias=True)
    runs = [_triton.forward(*inputs, *PLAIN, True, True, True, filtered=True) for _ in range(2)]
    flags = torch.cat(counted[: len(counted) // 2])
    assert 0 < flags.sum() < 0.6 * flags.numel()
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    for actual, true in zip(runs[0][5:], gradients(inputs, PLAIN)[1], strict=True):
        assert relative(actual, true) <= STORED[dtype]


@pytest.mark.parametrize(
    ("rules", "options"),
    [
        # no softmax of 45 classes is below 2e-4 here
        pytest.param(PLAIN, {"bias": True}, id="plain"),
        pytest.param(SMOOTH, {"labels": 2}, id="smoothing"),
        # these gradients are made again, from every class
        pytest.param(SMOOTH._replace(softcap=2.0), {"spread": 60.0}, id="smoothing-softcap"),
        pytest.param(PLAIN, {"ignored": 1.0}, id="ignored"),
        pytest.param(PLAIN, {"tokens": 0}, id="empty"),
    ],
)
def test_where_everything_counts_it_is_the_fused_loss(rules: Rules, options: dict[str, Any]):
    inputs = case(dtype=torch.bfloat16, **options)
    wanted = True, True, inputs.linear_bias is not None
    one, other = (_triton.forward(*inputs, *rules, *wanted, filtered=f) for f in (False, True))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


# rows done again at their maximum, whose first exponentials overflow
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_losses_beyond_the_range_of_exponentials(counted: list[Tensor]):
    inputs = sided(push=200.0)
    values, exact = gradients(inputs, PLAIN)
    assert values[1].max() > 150
    got = _triton.forward(*inputs, *PLAIN, True, True, False, filtered=True)
    flags = torch.cat(counted)
    assert 0 < flags.sum() < 0.6 * flags.numel()
    for actual, true in zip(got[5:], exact, strict=False):
        assert relative(actual, true) <= 5e-5


# a token of nothing else, and what the sums of a loss make of it
@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value encountered")
def test_what_is_not_a_number_is_not_left_out():
    inputs = sided(push=12.0, dtype=torch.bfloat16, ignored=0.0)
    inputs.input[5, 3] = torch.nan
    grad_input, grad_weight = _triton.forward(*inputs, *PLAIN, True, True, False, filtered=True)[
        5:7
    ]
    assert grad_input[5].isnan().all()
    assert grad_input[:5].isfinite().all()
    assert grad_weight.isnan().all()


def test_a_gradient_that_is_not_wanted_is_empty():
    inputs = sided(push=12.0, dtype=torch.bfloat16)
    whole = _triton.forward(*inputs, *PLAIN, True, True, False, filtered=True)
    for wanted in ((True, False), (False, True)):
        got = _triton.forward(*inputs, *PLAIN, *wanted, False, filtered=True)
        for one, other, asked in zip(got[5:7], whole[5:7], wanted, strict=True):
            assert torch.equal(one, other) if asked else one.shape == (0,)
