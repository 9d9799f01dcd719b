"""The softmax passes of the C++ library, digit by digit, on every instruction set."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from apical.kernels._common import native

needs_library = pytest.mark.skipif(not native.loaded(), reason=native.status()[1])


class Rows(NamedTuple):
    """A chunk of raw products and its labels, the target first."""

    raw: Tensor  # (R, V)
    bias: Tensor | None
    ids: Tensor  # (R, K)
    id_weight: Tensor  # (R, K)
    class_weight: Tensor | None


class Rules(NamedTuple):
    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0


def rows(R: int, V: int, K: int = 1, *, bias: bool = False, weighted: bool = False) -> Rows:
    """Logits whose distances to the largest are exact in float32: only our own rounding is left."""
    return Rows(
        raw=(8 * torch.randn(R, V)).mul(1024).round().div(1024),
        bias=torch.randn(V).mul(1024).round().div(1024) if bias else None,
        ids=torch.randint(0, V, (R, K)),
        id_weight=torch.rand(R, K) + 0.1,
        class_weight=torch.rand(V) if weighted else None,
    )


def truth(x: Rows, rules: Rules, up: tuple[Tensor, ...]) -> list[Tensor]:
    """Return loss, nll, lse, entropy, correct and the gradient of up . (loss, nll, lse)."""
    raw = x.raw.double().requires_grad_()
    z = rules.logit_scale * (raw if x.bias is None else raw + x.bias)
    if rules.softcap:
        z = rules.softcap * (z / rules.softcap).tanh()
    lse = z.logsumexp(1)
    labels = lse[:, None] - z.gather(1, x.ids)
    u = torch.ones(z.shape[1]).double() if x.class_weight is None else x.class_weight.double()
    loss = (labels * x.id_weight).sum(1) + rules.z_loss * lse.square()
    if rules.smoothing:
        loss = loss + rules.smoothing / z.shape[1] * ((lse[:, None] - z) * u).sum(1)
    nll = labels[:, 0]
    total = (torch.stack(up).double() * torch.stack((loss, nll, lse))).sum()
    (grad,) = torch.autograd.grad(total, raw)
    p = (z - lse[:, None]).exp()
    entropy = lse - (p * z.where(p > 0, 0)).sum(1)
    # of float32: far above the cap, float64 still tells logits apart
    correct = (z.gather(1, x.ids[:, :1])[:, 0].float() >= z.amax(1).float()).double()
    return [t.detach() for t in (loss, nll, lse, entropy, correct, grad)]


def gradient(x: Rows, weight: Tensor, rules: Rules, half: Tensor | None = None) -> list[Tensor]:
    logits = x.raw.clone()
    values = torch.ops.apical.softmax_gradient_(logits, *x[1:], weight, *rules, half)
    return [*values, logits]


def statistics(x: Rows, rules: Rules) -> list[Tensor]:
    return list(torch.ops.apical.softmax_statistics_(x.raw.clone(), *x[1:], *rules))


def backward(x: Rows, up: tuple, lse: Tensor, rules: Rules, half: Tensor | None = None) -> Tensor:
    logits = x.raw.clone()
    torch.ops.apical.softmax_backward_(logits, *x[1:], *up, lse, *rules, half)
    return logits


def close(got: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol)


# every length of the last vector, around one and several vectors of the widest registers
@needs_library
@pytest.mark.parametrize("V", [*range(1, 36), 63, 64, 65, 4095, 4096, 4097, 8200])
def test_keeps_every_digit(V):
    x, weight, rules = rows(5, V), torch.rand(5) - 0.5, Rules(z_loss=1e-3)
    loss, nll, lse, entropy, correct, grad = truth(x, rules, (weight, *torch.zeros(2, 5)))
    got = gradient(x, weight, rules)
    for a, b in zip(got, statistics(x, rules), strict=False):
        assert torch.equal(a, b)
    close(got[0], loss, rtol=3e-7, atol=1e-12)
    close(got[1], nll, rtol=2e-7, atol=1e-12)
    close(got[2], lse, rtol=2e-7, atol=1e-7)
    # what is left of two numbers of the size of log_sum
    close(got[3], entropy, rtol=1e-6, atol=2e-7)
    assert torch.equal(got[4].double(), correct)
    # each entry on its own, so that small probabilities count as much as large ones
    close(got[5], grad, rtol=8e-7, atol=1e-37)


OPTIONS = {
    "bias": ({"bias": True}, Rules()),
    "scale": ({}, Rules(logit_scale=0.4)),
    # turns the order of the logits around
    "negative scale": ({}, Rules(logit_scale=-0.5)),
    "softcap": ({}, Rules(softcap=15.0)),
    # nearly every logit at the cap, where its slope vanishes
    "hard softcap": ({}, Rules(softcap=0.5)),
    "softcap, bias and scale": ({"bias": True}, Rules(softcap=30.0, logit_scale=0.7)),
    "smoothing": ({}, Rules(smoothing=0.1)),
    "smoothing of weighted classes": ({"weighted": True}, Rules(smoothing=0.1)),
    # then class weights are in id_weight alone
    "weighted classes": ({"weighted": True}, Rules()),
    "soft labels": ({"K": 4}, Rules()),
    "everything": (
        {"K": 3, "bias": True, "weighted": True},
        Rules(smoothing=0.2, z_loss=1e-3, softcap=20.0, logit_scale=1.5),
    ),
}


def check_options(name: str, V: int) -> None:
    shape, rules = OPTIONS[name]
    x, weight = rows(6, V, **shape), torch.rand(6) + 0.5
    *values, correct, grad = truth(x, rules, (weight, *torch.zeros(2, 6)))
    *got, got_correct, got_grad = gradient(x, weight, rules)
    for a, b in zip(got, values, strict=True):
        close(a, b, rtol=2e-6, atol=2e-6)
    assert torch.equal(got_correct.double(), correct)
    # the slope of the cap, 1 - (z / cap)^2, is taken of a logit rounded to float32
    atol = 2e-6 if rules.softcap else 2e-7
    close(got_grad, grad, rtol=1e-5, atol=atol)
    for a, b in zip([*got, got_correct], statistics(x, rules), strict=True):
        assert torch.equal(a, b)
    up = torch.randn(3, 6)
    expected = truth(x, rules, tuple(up))[-1]
    # lse is rounded to float32, which moves every probability of its row alike
    close(backward(x, tuple(up), got[2], rules), expected, rtol=2e-5, atol=atol)
    *_, expected = truth(x, rules, (up[0], *torch.zeros(2, 6)))
    close(backward(x, (up[0], None, None), got[2], rules), expected, rtol=2e-5, atol=atol)


@needs_library
@pytest.mark.parametrize("V", [1, 2, 50, 4133])  # ragged, and more than one block of sums
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name, V):
    check_options(name, V)


@needs_library
@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_in_bfloat16_is_that_in_float32_rounded(name):
    shape, rules = OPTIONS[name]
    x, weight = rows(4, 4133, **shape), torch.tensor([1.0, 0.0, 0.3, 2.0])
    half = torch.full((4, 4133), float("nan"), dtype=torch.bfloat16)
    *_, grad = gradient(x, weight, rules)
    got = gradient(x, weight, rules, half)
    assert torch.equal(half, grad.bfloat16())
    for a, b in zip(got[:5], gradient(x, weight, rules), strict=False):
        assert torch.equal(a, b)
    up, lse = tuple(torch.randn(3, 4)), got[2]
    grad = backward(x, up, lse, rules)
    backward(x, up, lse, rules, half)
    assert torch.equal(half, grad.bfloat16())


@needs_library
def test_labels_that_repeat_add_up():
    # the target among the soft labels, and one of those twice
    ids, id_weight = torch.tensor([[3, 5, 3, 5], [7, 0, 0, 0]]), torch.rand(2, 4)
    x = rows(2, 40)._replace(ids=ids, id_weight=id_weight)
    zeros = torch.zeros(2)
    *_, grad = gradient(x, torch.ones(2), Rules())
    close(grad, truth(x, Rules(), (torch.ones(2), zeros, zeros))[-1], rtol=2e-6, atol=1e-12)


@needs_library
@pytest.mark.parametrize("K", [1, 3])
def test_a_nearly_certain_target_keeps_its_digits(K):
    # p - 1 of the target is far below float's epsilon: the rest must not vanish in it
    raw = torch.tensor([[30.0, 0.0, 1.0, -5.0], [0.0, 20.0, -2.0, 4.0]])
    ids = torch.tensor([[0], [1]]).repeat(1, K)  # the same label K times
    x = Rows(raw, None, ids, torch.full((2, K), 1 / K), None)
    below = raw.double() - raw.double().gather(1, ids[:, :1])
    rest = below.scatter(1, ids, -torch.inf).exp().sum(1)
    mean = (below * below.exp()).sum(1) / (1 + rest)
    got = gradient(x, torch.ones(2), Rules())
    close(got[1], rest.log1p(), rtol=3e-7, atol=0)
    close(got[3], rest.log1p() - mean, rtol=1e-6, atol=0)
    close(got[5].gather(1, ids)[:, 0], -rest / (1 + rest), rtol=1e-6, atol=0)
    again = backward(x, (torch.ones(2), None, None), got[2], Rules())
    close(again.gather(1, ids)[:, 0], -rest / (1 + rest), rtol=1e-5, atol=0)


@needs_library
def test_with_extreme_logits():
    inf = float("inf")
    raw = torch.tensor(
        [
            [0.0, -inf, -200.0, 1.0],  # impossible tokens
            [3e38, 0.0, -3e38, 0.0],  # near the largest float
            [-inf, 0.0, 0.0, 0.0],  # an impossible target
            [-3e38, -3e38, -3e38, -3e38],
            [0.0, -87.5, -87.9, -88.5],  # where exponentials end
        ]
    )
    x = Rows(raw, None, torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1), None)
    # float64 has no digits for 3e38 + 1, either
    top = raw.double().amax(1, keepdim=True)
    near = x._replace(raw=raw.double() - top)
    expected = truth(near, Rules(), (torch.ones(5), *torch.zeros(2, 5)))
    expected[2] += top[:, 0]
    got = gradient(x, torch.ones(5), Rules())
    for a, b in zip(got[:5], expected, strict=False):
        close(a, b, rtol=1e-6, atol=2e-36)
    close(got[5], expected[5], rtol=1e-6, atol=2e-38)
    assert got[5][0, 1] == 0


@needs_library
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("column", [0, 1, 20], ids=["target", "other", "tail"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_shows_what_is_not_finite(value, column, softcap):
    raw = torch.zeros(1, 21)
    raw[0, column] = value
    x = Rows(raw, None, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), None)
    half = torch.zeros(1, 21, dtype=torch.bfloat16)
    *values, _, grad = gradient(x, torch.ones(1), Rules(softcap=softcap))
    gradient(x, torch.ones(1), Rules(softcap=softcap), half)
    if value == float("inf") and softcap:  # the cap is a finite logit
        assert torch.isfinite(torch.cat([*values, grad[0]])).all()
        return
    assert not torch.isfinite(torch.cat(values)).any()
    assert not torch.isfinite(grad).any()
    assert not torch.isfinite(half).any()


@needs_library
def test_smoothing_of_an_impossible_token_is_infinite():
    x = rows(1, 30)
    x.raw[0, 17] = -torch.inf
    x.ids[0] = 3
    loss, nll, *_ = statistics(x, Rules(smoothing=0.1))
    assert loss.item() == torch.inf
    assert nll.isfinite().all()


@needs_library
@pytest.mark.parametrize("half", [False, True])
def test_leaves_out_rows_of_weight_zero(half):
    x = rows(3, 40, K=2)
    x.raw[0] = torch.nan
    x.ids[0] = -100
    weight, to = torch.tensor([0.0, 1.0, 0.0]), None
    if half:
        to = torch.full((3, 40), torch.nan, dtype=torch.bfloat16)
    *values, grad = gradient(x, weight, Rules(z_loss=1.0, smoothing=0.1), to)
    grad = grad if to is None else to
    assert not grad[[0, 2]].any()
    assert grad[1].all()
    for value in values[:4]:
        assert not value[[0, 2]].any()
        assert value[1] != 0


@needs_library
def test_without_rows():
    x = rows(0, 7)
    assert all(len(value) == 0 for value in gradient(x, torch.ones(0), Rules()))


@needs_library
def test_does_not_depend_on_threads():
    shape, rules = OPTIONS["everything"]
    x, weight = rows(37, 1003, **shape), torch.rand(37)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(gradient(x, weight, rules))
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([[0], [9]])}, r"ids\[1, 0\] is 9, expected 0 <= id < V = 9"),
        ({"ids": torch.tensor([[-1], [0]])}, r"ids\[0, 0\] is -1"),
        ({"ids": torch.tensor([0, 1])}, "ids must be an"),
        ({"ids": torch.tensor([[0]])}, r"ids must be a contiguous \(2, 1\)"),
        ({"ids": torch.tensor([[0], [1]]).int()}, "ids must be int64"),
        ({"id_weight": torch.ones(2, 2)}, r"id_weight must be a contiguous \(2, 1\)"),
        ({"bias": torch.ones(8)}, "bias must be a contiguous vector with one entry per column"),
        ({"class_weight": torch.ones(9).double()}, "class_weight must be float32"),
        ({"token_weight": torch.ones(3)}, "token_weight must be .* one entry per row"),
        ({"logits": torch.ones(2, 9).double()}, "logits must be float32"),
        ({"logits": torch.ones(9, 2).t()}, "logits must be a contiguous"),
        ({"half": torch.ones(2, 9)}, "half must be bfloat16"),
        ({"half": torch.ones(2, 8).bfloat16()}, r"half must be a contiguous \(2, 9\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_checks_at_the_door(change, message):
    good = {
        "logits": torch.ones(2, 9),
        "bias": None,
        "ids": torch.tensor([[0], [1]]),
        "id_weight": torch.ones(2, 1),
        "class_weight": None,
        "token_weight": torch.ones(2),
    }
    half = change.get("half")
    arguments = {key: change.get(key, value) for key, value in good.items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.apical.softmax_gradient_(*arguments.values(), *Rules(), half)


def instruction_sets() -> list[str]:
    if not native.loaded():
        return []
    named = {"avx512": torch.cpu._is_avx512_supported, "avx2": torch.cpu._is_avx2_supported}
    return ["baseline", *(name for name, supported in named.items() if supported())]


# every set of loops that this processor can run, not only the best one
@pytest.mark.parametrize("isa", instruction_sets())
def test_every_instruction_set(isa):
    code = f"""
import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_softmax_pass as tests
assert torch.ops.apical.cpu_isa() == {isa!r}
torch.manual_seed(0)
for V in (1, 7, 33, 4133):
    tests.test_keeps_every_digit(V)
    for name in tests.OPTIONS:
        tests.check_options(name, V)
for name in tests.OPTIONS:
    tests.test_gradient_in_bfloat16_is_that_in_float32_rounded(name)
tests.test_with_extreme_logits()
for value in (float("nan"), float("inf")):
    tests.test_shows_what_is_not_finite(value, 20, 0.0)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "APICAL_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@needs_library
def test_an_unknown_instruction_set_is_named():
    code = "from apical.kernels._common import native; native.loaded()\n"
    code += "import torch; torch.ops.apical.cpu_isa()"
    environment = {**os.environ, "APICAL_ISA": "sse9"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "APICAL_ISA=sse9 is unknown or not supported" in run.stderr.splitlines()[-1]
