"""What users of other fused losses ran into, each under its issue's number.

Numbers without a name are of linkedin/Liger-Kernel.
"""

from typing import Any

import pytest
import torch

from apical import linear_cross_entropy

from .linear_cross_entropy_cases import (
    IGNORE,
    PASSES,
    definition,
    force,
    grad_of,
    labelled_rows,
    leaf,
    relative,
    sample,
)

pytestmark = pytest.mark.usefixtures("softmax_pass", "one_thread")


@pytest.fixture(params=PASSES)
def softmax_pass(request, monkeypatch):
    force(request.param, monkeypatch)


@pytest.fixture
def one_row_chunks(monkeypatch):
    monkeypatch.setattr(labelled_rows, "_CHUNK_ROWS", (1, 1))


@pytest.mark.usefixtures("one_row_chunks")
def test_512_827_830_bfloat16_gradients_do_not_drift_with_the_chunks():
    # added up in bfloat16, 512 chunks are 10 % off; CCE #14, axolotl #1601, Megatron #2206
    x, W, y = sample(512, 31)
    ours = (leaf(x, torch.bfloat16), leaf(W, torch.bfloat16))
    exact = (leaf(ours[0], torch.float64), leaf(ours[1], torch.float64))
    linear_cross_entropy(*ours, y).loss.backward()
    definition(*exact, y).loss.backward()
    for a, e in zip(ours, exact, strict=True):
        assert relative(grad_of(a), grad_of(e)) <= 3e-3


@pytest.mark.usefixtures("one_row_chunks")
def test_torch_bfloat16_loss_does_not_drift_with_the_chunks():
    # torch 2.13's own: 12.69 instead of 11.29, as its sum over chunks is in bfloat16
    x, W, y = sample(512, 31)
    loss = linear_cross_entropy(x.bfloat16(), W.bfloat16(), y).loss
    truth = definition(x.bfloat16().double(), W.bfloat16().double(), y).loss
    assert relative(loss, truth) <= 1e-6


@pytest.mark.parametrize("first", ["ignored", "weighted"])
def test_678_968_no_reduction_uses_every_tokens_own_gradient(first):
    # all gradients were multiplied by the first token's: nothing was learnt if it was ignored
    x, W, y = sample(40, 31, ignored=0.0)
    y[0] = IGNORE if first == "ignored" else 3
    upstream = torch.linspace(5, -5, 40)
    ours, exact = leaf(W), leaf(W, torch.float64)
    (linear_cross_entropy(x, ours, y, reduction="none").loss * upstream).sum().backward()
    (definition(x.double(), exact, y, reduction="none").loss * upstream.double()).sum().backward()
    assert relative(grad_of(ours), grad_of(exact)) <= 2e-6


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_930_evaluation_without_gradients(context, reduction):
    x, W, y = sample(40, 31)
    expected = linear_cross_entropy(leaf(x), leaf(W), y, reduction=reduction)
    with context():
        got = linear_cross_entropy(leaf(x), leaf(W), y, reduction=reduction)
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e.detach(), rtol=1e-6, atol=1e-6)
        assert not a.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_head_over_a_frozen_trunk_gets_its_gradient(reduction):
    # Liger 0.8.5 computes gradients only if input wants one; weight.grad stays None
    x, W, y = sample(40, 31)
    ours, bias, exact = leaf(W), leaf(torch.zeros(31)), leaf(W, torch.float64)
    linear_cross_entropy(x, ours, y, linear_bias=bias, reduction=reduction).loss.sum().backward()
    definition(x.double(), exact, y, reduction=reduction).loss.sum().backward()
    assert relative(grad_of(ours), grad_of(exact)) <= 2e-6
    assert bool(grad_of(bias).any())


def test_802_accumulated_losses_are_not_multiplied_by_the_number_of_steps():
    # unsloth #8261, TRL #5890: silently divided by it
    x, W, y = sample(64, 31)
    items = (y != IGNORE).sum()
    parts = [
        linear_cross_entropy(rows, W, labels, num_items=items).loss
        for rows, labels in zip(x.split(8), y.split(8), strict=True)
    ]
    whole = linear_cross_entropy(x, W, y).loss
    assert relative(torch.stack(parts).sum(), whole.double()) <= 1e-6


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"logit_scale": 0.0625}])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_unsloth_11277_trl_6629_logits_are_scaled_and_capped(options, reduction):
    # Cohere's loss was 7.90 instead of 2.02: the factor on the logits was dropped
    x, W, y = sample(40, 31)
    got = linear_cross_entropy(4 * x, W, y, reduction=reduction, **options).loss
    truth = definition(4 * x.double(), W.double(), y, reduction=reduction, **options).loss
    without = definition(4 * x.double(), W.double(), y, reduction=reduction).loss
    assert relative(got, truth) <= 1e-6
    assert relative(without, truth) > 0.1


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_olmo_z_loss_is_off_unless_asked_for(reduction):
    # OLMo-core passes `z_loss_multiplier or 1e-4`: None became 1e-4
    x, W, y = sample(40, 31)
    result = linear_cross_entropy(x, W, y, reduction=reduction)
    assert result.z == 0
    truth = definition(x.double(), W.double(), y, reduction=reduction).loss
    assert relative(result.loss, truth) <= 1e-6


def test_olmo_z_loss_is_a_mean_over_the_labelled_tokens():
    # old OLMo divides by all tokens
    x, W, y = sample(40, 31, ignored=0.5)
    labelled = y != IGNORE
    few = linear_cross_entropy(x[labelled], W, y[labelled], z_loss=0.1)
    all_of_them = linear_cross_entropy(x, W, y, z_loss=0.1)
    assert relative(all_of_them.z, few.z.double()) <= 1e-6
    # Liger's is in the dtype of the inputs
    assert linear_cross_entropy(x.bfloat16(), W.bfloat16(), y, z_loss=0.1).z.dtype == torch.float32


@pytest.mark.parametrize("shift", [-20.0, 20.0])
def test_cce_52_53_losses_with_a_bias_are_not_negative(shift):
    x, W, y = sample(40, 31)
    bias = torch.randn(31) + shift
    nll = linear_cross_entropy(x, W, y, linear_bias=bias, reduction="none").nll
    truth = definition(x.double(), W.double(), y, linear_bias=bias.double()).nll
    assert bool((nll >= 0).all())
    assert relative(nll, truth) <= 2e-6


@pytest.mark.parametrize(
    ("input_dtype", "weight_dtype", "bias_dtype"),
    [(torch.bfloat16, torch.float32, torch.float32), (torch.float32, torch.bfloat16, torch.half)],
)
def test_305_dtypes_may_differ_as_under_autocast(input_dtype, weight_dtype, bias_dtype):
    x, W, y = sample(40, 31)
    dtypes = (input_dtype, weight_dtype, bias_dtype)
    ours = [leaf(t, d) for t, d in zip((x, W, torch.randn(31)), dtypes, strict=True)]
    exact = [leaf(t, torch.float64) for t in ours]
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(ours[0], ours[1], y, linear_bias=ours[2]).loss
        loss.backward()
    truth = definition(exact[0], exact[1], y, linear_bias=exact[2]).loss
    truth.backward()
    assert relative(loss, truth) <= 1e-6
    for a, e, dtype in zip(ours, exact, dtypes, strict=True):
        assert grad_of(a).dtype == dtype
        assert relative(grad_of(a), grad_of(e)) <= (2e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_916_labels_out_of_range_are_not_read(reduction):
    # memory beyond the logits, or, in CCE, another token's logit
    x, W, y = sample(40, 31)
    y[7] = 31
    options: dict[str, Any] = {"reduction": reduction, "weight": torch.ones(31)}
    with pytest.raises(ValueError, match="target holds the label 31"):
        linear_cross_entropy(x, W, y, **options)


def test_mosaicbert_token_zero_is_a_label():
    # `labels > 0` as the mask drops it
    x, W, _ = sample(6, 31)
    y = torch.zeros(6, dtype=torch.long)
    truth = definition(x.double(), W.double(), y).loss
    assert relative(linear_cross_entropy(x, W, y).loss, truth) <= 1e-6


def test_torchtitan_the_upstream_gradient_counts():
    # gradients computed in the forward, and never multiplied by what the backward brings
    x, W, y = sample(40, 31)
    a, b = leaf(W), leaf(W)
    linear_cross_entropy(x, a, y).loss.backward()
    (linear_cross_entropy(x, b, y).loss * -8).backward()
    assert torch.equal(grad_of(b), -8 * grad_of(a))
