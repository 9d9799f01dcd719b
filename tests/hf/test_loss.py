import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
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
    ],
    ids=["plain", "count", "tensor-count", "ignore-index", "shifted"],
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


def test_a_step_leaves_nothing_alive(build):
    _, fused = stock_and_fused(build)
    fused(IDS, labels=IDS)
    held = vars(fused._apical_loss).values()
    assert not any(isinstance(value, torch.Tensor | nn.Module) for value in held)


def test_a_new_head_is_noticed(build):
    _, fused = stock_and_fused(build)
    fused.resize_token_embeddings(70)
    with pytest.raises(NotImplementedError, match="new head"):
        fused(IDS, labels=IDS)
    use_kernels(fused, attention=False)
    assert fused(IDS, labels=IDS).logits is None


def test_logits_changed_between_head_and_loss_are_noticed(build):
    _, model = stock_and_fused(build)
    model.lm_head.register_forward_hook(lambda head, args, logits: 2 * logits)
    with pytest.raises(NotImplementedError, match="changes logits between its head and its loss"):
        model(IDS, labels=IDS)


class WrappedHead(nn.Linear):
    """As an adapter would put around the head."""


def with_(model, **attributes):
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


REFUSED = {
    "softcap": (lambda build: build("gemma2"), "final_logit_softcapping=30"),
    "logits-scaling": (lambda build: build("granite"), "logits_scaling=1"),
    "logit-scale": (lambda build: build("cohere"), "logit_scale=0.0625"),
    "bias": (lambda build: build("bert"), "bias"),
    "own-loss": (lambda build: with_(build("llama"), loss_function=mse_loss), "stock loss"),
    "wrapped": (
        lambda build: with_(build("llama"), lm_head=WrappedHead(32, 61, bias=False)),
        "Wrapp",
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


def test_the_stock_loss_set_by_hand_comes_back(build):
    model = with_(build("llama"), loss_function=ForCausalLMLoss)
    use_kernels(model)
    use_kernels(model, attention=False, loss=False)
    assert vars(model)["_loss_function"] is ForCausalLMLoss


class Examples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 61, (12,), generator=torch.Generator().manual_seed(index))
        # lengths differ, so that a mean of means is not the mean
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) > index % 9 + 2, -100)}


def train(model, path):
    from transformers import Trainer, TrainingArguments

    options = TrainingArguments(
        str(path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=options, train_dataset=Examples(), eval_dataset=Examples())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, trainer.evaluate()["eval_loss"]


def test_trainer_with_gradient_accumulation_trains_the_same_model(build, tmp_path):
    pytest.importorskip("accelerate")
    stock, fused = stock_and_fused(build)
    use_kernels(fused)
    theirs, their_evaluation = train(stock, tmp_path)
    ours, our_evaluation = train(fused, tmp_path)
    assert len(ours) == 4
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert our_evaluation == pytest.approx(their_evaluation, rel=1e-5)
    for (name, weight), trained in zip(stock.named_parameters(), fused.parameters(), strict=True):
        assert (weight - trained).abs().max() <= 1e-4, name
