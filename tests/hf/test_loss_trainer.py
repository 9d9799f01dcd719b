"""transformers' own Trainer, with gradient accumulation and evaluation."""

import copy

import pytest
import torch

from apical.hf import use_kernels

pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments


class Examples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 61, (12,), generator=torch.Generator().manual_seed(index))
        # lengths differ, so that a mean of means is not the mean
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) > index % 9 + 2, -100)}


def train(model, path):
    options = TrainingArguments(
        str(path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=1e-2,
        # Adam would blow up the rounding errors of gradients that are 0, as those of key biases
        optim="sgd",
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


@pytest.mark.parametrize("name", ["llama", "gemma2", "distilbert"])
def test_trainer_with_gradient_accumulation_trains_the_same_model(build, tmp_path, name):
    # distilbert computes its own mean of means, the others one over all tokens
    stock = build(name)
    fused = use_kernels(copy.deepcopy(stock), attention=name == "llama")
    theirs, their_evaluation = train(stock, tmp_path)
    ours, our_evaluation = train(fused, tmp_path)
    assert len(ours) == 4
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert our_evaluation == pytest.approx(their_evaluation, rel=1e-5)
    for (key, weight), trained in zip(stock.named_parameters(), fused.parameters(), strict=True):
        assert (weight - trained).abs().max() <= 1e-6, key


def test_evaluation_hands_logits_to_metrics(build, tmp_path):
    fused = use_kernels(build("gemma2"))
    seen = []
    options = TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, dataloader_pin_memory=False
    )
    trainer = Trainer(
        model=fused,
        args=options,
        eval_dataset=Examples(),
        compute_metrics=lambda found: seen.append(torch.as_tensor(found.predictions).shape) or {},
    )
    trainer.evaluate()
    assert seen == [(24, 12, 61)]
