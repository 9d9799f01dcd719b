import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaModel
from transformers.loss.loss_utils import ForCausalLMLoss

from apical.hf import explain, use_kernels


def stock_and_fused(build, name="llama", *, z_loss=0.0, **options):
    stock = build(name, **options).train()
    return stock, use_kernels(copy.deepcopy(stock), attention=False, z_loss=z_loss)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]):
    assert ours.keys() == theirs.keys()
    largest = max(grad.abs().max() for grad in theirs.values())
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= 1e-5 * largest, name


def some_labels(ids: torch.Tensor) -> torch.Tensor:
    return ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)


IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": 40},
        # the Trainer counts in a tensor
        {"num_items_in_batch": torch.tensor(17)},
        {"ignore_index": 5},
        # already shifted, as under context parallelism
        {"shift_labels": IDS.roll(-1, 1)},
        # documents that start anywhere
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5, 6], list(range(12))])},
    ],
    ids=["plain", "count", "tensor-count", "ignore-index", "shifted", "packed"],
)
def test_loss_equals_stock(build, options):
    stock, fused = stock_and_fused(build)
    labels = some_labels(IDS)
    if "ignore_index" in options:
        labels = labels.masked_fill(labels == -100, 5)
    theirs = stock(IDS, labels=labels, **options)
    ours = fused(IDS, labels=labels, **options)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    assert_equal(gradients(fused, ours.loss), gradients(stock, theirs.loss))
    assert ours.logits is None
    assert "logits" not in ours


def test_masked_models_are_not_shifted(build):
    stock, fused = stock_and_fused(build, "modernbert")
    labels = some_labels(IDS)
    theirs, ours = (model(IDS, labels=labels) for model in (stock, fused))
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    assert_equal(gradients(fused, ours.loss), gradients(stock, theirs.loss))


@pytest.mark.parametrize("kept", [5, torch.tensor([1, 4, 7, 8])], ids=["last", "indices"])
def test_some_logits_are_kept(build, kept):
    stock, fused = stock_and_fused(build)
    chosen = IDS[:, -kept:] if isinstance(kept, int) else IDS[:, kept]
    options = {"labels": chosen, "logits_to_keep": kept}
    theirs, ours = (model(IDS, **options).loss for model in (stock, fused))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert_equal(gradients(fused, ours), gradients(stock, theirs))
    # labels of other rows are an error of the user in both
    for model in (stock, fused):
        with pytest.raises(ValueError, match=r"batch_size|shape"):
            model(IDS, labels=IDS, logits_to_keep=5)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0), 7])
def test_a_batch_without_labels_costs_nothing(build, count):
    _, fused = stock_and_fused(build, z_loss=0.1)
    loss = fused(IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=count).loss
    torch.testing.assert_close(loss, torch.tensor(0.0), rtol=0, atol=0)
    assert not any(grad.any() for grad in gradients(fused, loss).values())


def test_z_loss_is_added_in_training(build):
    stock, fused = stock_and_fused(build, z_loss=0.01)
    logits = stock(IDS).logits[:, :-1].double()
    z_term = 0.01 * logits.logsumexp(-1).square().mean()
    expected = cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()) + z_term
    ours = fused(IDS, labels=IDS).loss
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0)
    assert_equal(gradients(fused, ours), gradients(stock, expected))
    # evaluation reports the plain loss
    assert torch.equal(fused.eval()(IDS, labels=IDS).loss, stock.eval()(IDS, labels=IDS).loss)


def test_evaluation_and_calls_without_labels_are_stock_bitwise(build):
    stock, fused = stock_and_fused(build)
    assert torch.equal(fused(IDS).logits, stock(IDS).logits)
    theirs, ours = (model.eval()(IDS, labels=IDS) for model in (stock, fused))
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)


def test_tuples_keep_their_places(build):
    stock, fused = stock_and_fused(build)
    theirs, ours = (model(IDS, labels=IDS, return_dict=False) for model in (stock, fused))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
    assert ours[1] is None
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("frozen", ["lm_head", "model"])
def test_frozen_parts(build, frozen):
    stock, fused = stock_and_fused(build)
    for model in (stock, fused):
        model.get_submodule(frozen).requires_grad_(False)
    theirs, ours = (gradients(m, m(IDS, labels=IDS).loss) for m in (stock, fused))
    assert not any(name.startswith(frozen) for name in ours)
    assert_equal(ours, theirs)


def test_no_tensor_of_the_size_of_the_logits_is_made(build):
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default and out.shape[-1] == 61:
                self.rows = max(self.rows, out.shape[0])
            return out

    stock, fused = stock_and_fused(build)
    seen = []
    for model in (stock, fused):
        with Largest() as largest:
            model(IDS, labels=IDS)
        seen.append(largest.rows)
    # the head multiplies all rows in the stock model and none in ours
    assert seen == [IDS.numel(), 0]


def test_the_head_works_after_a_step_that_failed(build):
    _, fused = stock_and_fused(build)
    with pytest.raises(IndexError):
        fused(IDS + 61, labels=IDS)
    states = torch.randn(3, 32)
    assert torch.equal(fused.lm_head(states), states @ fused.lm_head.weight.T)


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_leaves_nothing_alive(build, fails):
    _, fused = stock_and_fused(build)
    # labels beyond the vocabulary fail inside of the head's second call
    with pytest.raises(ValueError, match="label") if fails else contextlib.nullcontext():
        fused(IDS, labels=IDS + 61 * fails)
    held = [*vars(fused._apical_loss).values(), *vars(fused.lm_head).values()]
    assert not any(isinstance(value, torch.Tensor | nn.Module) for value in held)
    assert "_apical_step" not in vars(fused.lm_head)


def replica(module: nn.Module) -> nn.Module:
    """As nn.DataParallel makes them: other modules, the same hooks."""
    copied = module._replicate_for_data_parallel()
    copied._parameters = dict(module._parameters)
    copied._modules = {
        name: None if child is None else replica(child) for name, child in module._modules.items()
    }
    return copied


@pytest.mark.parametrize("place", ["model.norm", "lm_head"])
def test_replicas_do_not_meet(build, place):
    stock, fused = stock_and_fused(build)
    first, second = replica(fused), replica(fused)
    others = []
    here = first.get_submodule(place)

    def meet(module, args):
        # the second runs while the first is on its way, as threads would
        if module is here:
            others.append(second(IDS[:1], labels=IDS[:1]).loss)

    # replicas share their hooks
    here.register_forward_pre_hook(meet)
    ours = first(IDS, labels=IDS)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, stock(IDS, labels=IDS).loss, rtol=1e-6, atol=0)
    theirs = stock(IDS[:1], labels=IDS[:1]).loss
    assert others
    for other in others:
        torch.testing.assert_close(other, theirs, rtol=1e-6, atol=0)


def test_a_new_head_is_noticed(build):
    _, fused = stock_and_fused(build)
    fused.resize_token_embeddings(70)
    with pytest.raises(NotImplementedError, match="a new one"):
        fused(IDS, labels=IDS)
    use_kernels(fused, attention=False)
    assert fused(IDS, labels=IDS).logits is None


@pytest.mark.parametrize("change", [lambda x: 2 * x, lambda x: x.sigmoid()])
def test_a_hook_that_changes_logits_is_noticed(build, change):
    _, model = stock_and_fused(build)
    model.lm_head.register_forward_hook(lambda head, args, logits: change(logits))
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM.*(hook that|sigmoid)"):
        model(IDS, labels=IDS)


class WrappedHead(nn.Linear):
    """As an adapter would put around the head."""

    def forward(self, input):  # noqa: A002
        return super().forward(input) + 1


def with_(model, **attributes):
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


REFUSED = {
    "wrapped": (
        lambda build: with_(build("llama"), lm_head=WrappedHead(32, 61, bias=False)),
        "Wrapp",
    ),
    # as accelerate does where it moves weights around a forward
    "forward": (
        lambda build: with_(build("llama"), lm_head=with_(nn.Linear(32, 61), forward=lambda x: x)),
        "not a plain nn.Linear",
    ),
    "rows": (lambda build: with_(build("llama"), lm_head=nn.Linear(32, 64, bias=False)), "64 rows"),
    "no-head": (lambda build: LlamaModel(build("llama").config), "no language-model head"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fused_is_refused_and_changes_nothing(build, case):
    make, reason = REFUSED[case]
    model = make(build)
    with pytest.raises(NotImplementedError, match=f"{type(model).__name__}.*{reason}"):
        use_kernels(model, attention=False)
    assert reason in explain(model).splitlines()[2]
    assert "_apical_loss" not in vars(model)


def test_undo_leaves_no_hook_and_no_attribute(build):
    stock, fused = stock_and_fused(build)
    fused(IDS, labels=IDS)
    use_kernels(fused, attention=False, loss=False)
    for ours, theirs in zip(fused.modules(), stock.modules(), strict=True):
        assert vars(ours).keys() == vars(theirs).keys()
        assert not ours._forward_hooks
        assert not ours._forward_pre_hooks
    assert torch.equal(fused(IDS, labels=IDS).logits, stock(IDS, labels=IDS).logits)


def test_a_loss_function_set_by_hand_runs_and_stays(build):
    stock, fused = stock_and_fused(build)
    calls = []

    def counted(**options):
        calls.append(1)
        return 2 * ForCausalLMLoss(**options)

    fused.loss_function = counted
    theirs, ours = (model(IDS, labels=IDS).loss for model in (stock, fused))
    torch.testing.assert_close(ours, 2 * theirs, rtol=1e-6, atol=0)
    use_kernels(fused, attention=False, loss=False)
    fused(IDS, labels=IDS)
    assert len(calls) == 2


def test_generation_is_stock(build):
    stock, fused = stock_and_fused(build)
    fused(IDS, labels=IDS)
    options = {"max_new_tokens": 4, "do_sample": False}
    theirs, ours = (model.eval().generate(IDS, **options) for model in (stock, fused))  # pyright: ignore[reportCallIssue]
    assert torch.equal(ours, theirs)
