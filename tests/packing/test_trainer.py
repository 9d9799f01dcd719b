"""The collator inside transformers' Trainer, with the kernels in the model."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from apical.hf import use_kernels
from apical.packing import PackedCollator, pack


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = [9, 2, 17, 5, 1, 12, 8, 3, 20, 6, 4, 11]
    return [torch.randint(3, 61, (n,), generator=generator).tolist() for n in lengths]


def train(model: LlamaForCausalLM, rows: Dataset, folder: Path, **options) -> tuple[list, list]:
    """Train for two steps of two batches; return the batches' features and the logged losses."""
    seen = []

    def collate(features: list) -> dict:
        seen.append(features)
        return PackedCollator(pad_to_multiple_of=8)(features)

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(use_kernels(model), arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    return seen, [record["loss"] for record in trainer.state.log_history if "loss" in record]


def mean_alone(model: LlamaForCausalLM, texts: list[list[int]]) -> float:
    """Return the mean loss over all predicted tokens, from one call per document."""
    total, count = 0.0, 0
    for ids in texts:
        if len(ids) > 1:
            inputs = torch.tensor([ids])
            total += model(inputs, labels=inputs).loss.item() * (len(ids) - 1)
            count += len(ids) - 1
    return total / count


def test_documents_as_rows(model, tmp_path):
    stock = copy.deepcopy(model).to(torch.float64).eval()
    rows = Dataset.from_dict({"input_ids": documents()})
    seen, losses = train(model, rows, tmp_path, per_device_train_batch_size=3)
    first = [feature["input_ids"] for features in seen[:2] for feature in features]
    assert len(first) == 6
    assert losses[0] == pytest.approx(mean_alone(stock, first), rel=1e-5)
    assert len(losses) == 2


def test_packs_as_rows(model, tmp_path):
    stock = copy.deepcopy(model).to(torch.float64).eval()
    texts = documents()
    packs = pack([len(text) for text in texts], 20)
    rows = {
        "input_ids": [[token for n in places for token in texts[n]] for places in packs],
        "seq_lengths": [[len(texts[n]) for n in places] for places in packs],
    }
    # the trainer would take seq_lengths for a column that nobody uses
    options = {"per_device_train_batch_size": 1, "remove_unused_columns": False}
    seen, losses = train(model, Dataset.from_dict(rows), tmp_path, **options)
    first = []
    for (feature,) in seen[:2]:
        ids = torch.tensor(feature["input_ids"])
        first += [piece.tolist() for piece in ids.split(feature["seq_lengths"])]
    assert len(first) > 2
    assert losses[0] == pytest.approx(mean_alone(stock, first), rel=1e-5)


def test_the_model_learns(model, tmp_path):
    rows = Dataset.from_dict({"input_ids": documents()[:3]})
    options = {"per_device_train_batch_size": 3, "learning_rate": 1e-2}
    _, losses = train(model, rows, tmp_path, **options)
    assert losses[1] < losses[0]
