"""What the fused loss accepts, refuses and returns; its accuracy is in the file beside this."""

from typing import Any

import pytest
import torch

from apical import LinearCrossEntropyOutput, linear_cross_entropy

from .linear_cross_entropy_cases import IGNORE, PASSES, force, grad_of, leaf, sample


@pytest.fixture(params=PASSES)
def softmax_pass(request, monkeypatch):
    force(request.param, monkeypatch)


@pytest.mark.usefixtures("softmax_pass")
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_zero(reduction, impl):
    x, W = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    y = torch.full((6,), IGNORE)
    result = linear_cross_entropy(x, W, y, reduction=reduction, z_loss=1.0, impl=impl)
    result.loss.sum().backward()
    for tensor in (*result, grad_of(x), grad_of(W)):
        assert not tensor.any()


@pytest.mark.usefixtures("softmax_pass")
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_may_hold_nan(reduction, impl):
    x, W, y = sample(40, 31)
    grads = []
    for filler in (0.0, float("nan")):
        rows = torch.where((y == IGNORE)[:, None], filler, x)
        leaves = (leaf(rows), leaf(W))
        result = linear_cross_entropy(*leaves, y, reduction=reduction, z_loss=1e-3, impl=impl)
        result.loss.sum().backward()
        grads.append((result.loss.detach(), *(grad_of(t) for t in leaves)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    assert not grads[1][1][y == IGNORE].any()


@pytest.mark.usefixtures("softmax_pass")
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 5)], ids=["none", "no-columns", "all-ignored"])
def test_no_labelled_token_with_every_option(shape, reduction, impl):
    x, W, bias = (leaf(torch.randn(size)) for size in ((*shape, 4), (9, 4), (9,)))
    result = linear_cross_entropy(
        x,
        W,
        torch.full(shape, IGNORE),
        linear_bias=bias,
        weight=torch.rand(9),
        label_smoothing=0.1,
        z_loss=0.1,
        softcap=2.0,
        logit_scale=0.5,
        token_weight=torch.rand(shape),
        soft_ids=torch.full((*shape, 3), -1),
        soft_weights=torch.rand(*shape, 3),
        reduction=reduction,
        impl=impl,
    )
    assert result.loss.shape == (shape if reduction == "none" else ())
    result.loss.sum().backward()
    for tensor in (*result, grad_of(x), grad_of(W), grad_of(bias)):
        assert not tensor.any()


def test_one_token_without_axes():
    x, W = torch.randn(4), torch.randn(9, 4)
    soft: dict[str, Any] = {"soft_ids": torch.tensor([3]), "soft_weights": torch.tensor([0.4])}
    one = linear_cross_entropy(x, W, torch.tensor(5), reduction="none", **soft)
    stacked = {name: tensor[None] for name, tensor in soft.items()}
    many = linear_cross_entropy(x[None], W, torch.tensor([5]), **stacked)
    assert one.loss.shape == ()
    assert torch.equal(one.loss, many.loss)


def test_label_zero_counts_and_another_ignore_index_works():
    x, W, _ = sample(8, 31)
    y = torch.tensor([0, 5] * 4)
    everything = linear_cross_entropy(x, W, y, reduction="none").loss
    assert bool((everything > 0).all())
    without = linear_cross_entropy(x, W, y, reduction="none", ignore_index=0).loss
    assert torch.equal(without, torch.where(y == 0, 0.0, everything))


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
def test_num_items_makes_accumulation_exact(as_tensor):
    # micro-batches of unequal size, divided by the count of the whole batch
    x, W, y = sample(60, 31)
    whole, parts = leaf(W), leaf(W)
    one = linear_cross_entropy(x, whole, y, z_loss=1e-3)
    one.loss.backward()
    count = (y != IGNORE).sum()
    total, z = 0.0, 0.0
    for rows in (slice(0, 7), slice(7, 60)):
        items = count if as_tensor else int(count)
        part = linear_cross_entropy(x[rows], parts, y[rows], z_loss=1e-3, num_items=items)
        part.loss.backward()
        total, z = total + part.loss.item(), z + part.z.item()
    assert total == pytest.approx(one.loss.item(), rel=1e-6)
    assert z == pytest.approx(one.z.item(), rel=1e-6)
    torch.testing.assert_close(grad_of(parts), grad_of(whole), rtol=1e-5, atol=1e-7)


def test_num_items_zero_without_labels_is_zero():
    x, W, _ = sample(4, 31)
    assert linear_cross_entropy(x, W, torch.full((4,), IGNORE), num_items=0).loss.item() == 0


def test_parts_of_the_output():
    x, W, y = sample(50, 31)
    result = linear_cross_entropy(x, leaf(W), y, z_loss=1e-2)
    assert isinstance(result, LinearCrossEntropyOutput)
    count = (y != IGNORE).sum()
    torch.testing.assert_close(result.z, 1e-2 * result.lse.square().sum() / count)
    torch.testing.assert_close(result.loss, result.nll.sum() / count + result.z)
    assert [part.requires_grad for part in result] == [True, *[False] * 5]


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_layouts_and_leading_axes(impl):
    x, W, y = sample(48, 31)
    expected = linear_cross_entropy(x, W, y, impl=impl)
    columns, wide = x.t().contiguous().t(), torch.cat([W, W], 1)[:, : W.shape[1]]
    assert not columns.is_contiguous()
    assert not wide.is_contiguous()
    strided = linear_cross_entropy(columns, wide, y, impl=impl)
    batched = linear_cross_entropy(x.view(2, 4, 6, -1), W, y.view(2, 4, 6), impl=impl)
    for a, b, c in zip(expected, strided, batched, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(c, a, rtol=0, atol=0)


@pytest.mark.usefixtures("softmax_pass")
@pytest.mark.parametrize("label", [31, -1, 2**40])
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_a_label_outside_the_vocabulary_is_named(impl, label):
    x, W, y = sample(8, 31)
    y[3] = label
    with pytest.raises(ValueError, match=rf"label {label}, but linear_weight has V=31"):
        linear_cross_entropy(x, W, y, impl=impl)


SOFT = {"soft_ids": torch.zeros(4, 1).long(), "soft_weights": torch.ones(4, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "avg"}, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
        ({"impl": "triton"}, "impl must be 'fused', 'filtered' or 'reference', got 'triton'"),
        ({"z_loss": -1.0}, "z_loss must be a finite number >= 0, got -1.0"),
        ({"z_loss": float("nan")}, "z_loss must be a finite number"),
        ({"num_items": -1}, "num_items must be a count of tokens, got -1"),
        ({"num_items": 3, "reduction": "sum"}, "num_items is what 'mean' divides by"),
        ({"num_items": torch.ones(2)}, "num_items must be one number"),
        ({"target": torch.zeros(5, dtype=torch.long)}, r"target \(5,\) and input \(4, 3\)"),
        ({"target": torch.zeros(4)}, "target must be int64, got torch.float32"),
        ({"linear_weight": torch.ones(7, 2)}, "input has H=3, an earlier argument has H=2"),
        ({"linear_weight": torch.ones(7)}, r"linear_weight must have shape \(V H\)"),
        ({"input": torch.ones(4, 3).double()}, "input is torch.float64; impl='fused' takes"),
        ({"input": torch.ones(4, 3, device="meta")}, "on one device, got meta and target on cpu"),
        ({"weight": torch.ones(7, device="meta")}, "got cpu and weight on meta"),
        ({"token_weight": torch.ones(4, device="meta")}, "got cpu and token_weight on meta"),
        ({"linear_bias": torch.ones(8)}, "linear_bias has V=8, an earlier argument has V=7"),
        ({"linear_bias": torch.ones(7).long()}, "linear_bias is torch.int64; impl='fused' takes"),
        ({"weight": torch.ones(1, 7)}, r"weight must have shape \(V\)"),
        ({"weight": torch.ones(7).long()}, "weight must be floating point, got torch.int64"),
        ({"weight": leaf(torch.ones(7))}, r"weight gets no gradient; pass weight.detach\(\)"),
        ({"label_smoothing": 1.1}, "label_smoothing must be in 0 .. 1, got 1.1"),
        ({"label_smoothing": float("nan")}, "label_smoothing must be in 0 .. 1, got nan"),
        ({"softcap": 0.0}, "softcap must be a finite number > 0, or None for none, got 0.0"),
        ({"softcap": -1.0}, "softcap must be a finite number > 0"),
        ({"logit_scale": float("inf")}, "logit_scale must be a finite number, got inf"),
        ({"token_weight": torch.ones(5)}, r"token_weight must have target's shape \(4,\), got"),
        ({"token_weight": torch.ones(4).long()}, "token_weight must be floating point"),
        ({"token_weight": leaf(torch.ones(4))}, "token_weight gets no gradient"),
        ({"soft_ids": torch.zeros(4, 1).long()}, "soft_ids and soft_weights go together"),
        (SOFT | {"soft_ids": torch.zeros(4, 1)}, "soft_ids must be int64, got torch.float32"),
        (SOFT | {"soft_ids": torch.zeros(4, 2).long()}, r"got \(4, 2\) and \(4, 1\)"),
        (SOFT | {"soft_weights": torch.ones(4, 1).long()}, "soft_weights must be floating point"),
        (SOFT | {"soft_weights": leaf(torch.ones(4, 1))}, "soft_weights gets no gradient"),
        (SOFT | {"soft_ids": torch.full((4, 1), 7)}, "soft_ids holds the label 7, but linear_weig"),
        (SOFT | {"soft_ids": torch.full((4, 1), -1)}, "soft_ids holds the label -1"),
        ({"process_group": object(), "impl": "reference"}, "impl='reference' takes no process_gr"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message):
    good = {
        "input": torch.ones(4, 3),
        "linear_weight": torch.ones(7, 3),
        "target": torch.zeros(4, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(good | change))


@pytest.mark.parametrize("name", ["input", "linear_weight", "linear_bias", "weight"])
def test_sharded_tensors_are_refused(name):
    # CCE #31: illegal memory access; TRL #6065: mixed with plain tensors
    x, W, y = sample(4, 31)
    tensors: dict[str, Any] = {"linear_bias": torch.zeros(31), "weight": torch.ones(31)}
    tensors |= {"input": x, "linear_weight": W}
    setattr(tensors[name], "full_tensor", lambda: None)  # noqa: B010 - what tells a DTensor apart
    with pytest.raises(NotImplementedError, match=rf"{name}\.full_tensor\(\)"):
        linear_cross_entropy(target=y, **tensors)


def test_soft_labels_of_ignored_tokens_are_never_read():
    x, W, y = sample(40, 31)
    soft_ids, share = torch.randint(0, 31, (40, 3)), torch.rand(40, 3) / 3
    expected = linear_cross_entropy(x, W, y, soft_ids=soft_ids, soft_weights=share)
    soft_ids[y == IGNORE], share[y == IGNORE] = -7, float("nan")
    token_weight = torch.where(y == IGNORE, float("nan"), 1.0)
    got = linear_cross_entropy(
        x, W, y, soft_ids=soft_ids, soft_weights=share, token_weight=token_weight
    )
    for a, e in zip(got, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_class_weights_of_zero_give_zero(impl):
    # torch gives NaN
    x, W, y = leaf(torch.randn(6, 4)), torch.randn(9, 4), torch.arange(6)
    weight = (torch.arange(9) > 6).float()
    result = linear_cross_entropy(x, W, y, weight=weight, impl=impl)
    result.loss.backward()
    assert result.loss == 0
    assert not grad_of(x).any()
    assert bool((result.nll > 0).all())


def test_second_derivative_of_the_fused_loss_is_refused():
    x, W, y = sample(4, 31)
    x.requires_grad_()
    factor = torch.ones((), requires_grad=True)
    loss = linear_cross_entropy(x, W, y).loss * factor
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])  # both ways to the gradients
def test_autocast_changes_nothing_inside(reduction: str):
    x, W, y = sample(9, 31)
    leaves = x.requires_grad_(), W.requires_grad_()
    expected = linear_cross_entropy(x, W, y, reduction=reduction)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(x, W, y, reduction=reduction)
        grads = torch.autograd.grad(got.loss.sum(), leaves)
    assert torch.equal(got.loss, expected.loss)
    for grad, want in zip(grads, torch.autograd.grad(expected.loss.sum(), leaves), strict=True):
        assert torch.equal(grad, want)
