"""Loss on held-out text, per token and per byte."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from .data.batches import on_device, predicted_tokens
from .data.packing import PackedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HeldOut(NamedTuple):
    """The same held-out text every time: its batches, and how many tokens they predict."""

    batches: list[PackedBatch]
    tokens: int
    bytes_per_token: float


class Loss(NamedTuple):
    """nats_per_token is the mean over all predicted tokens; bits_per_byte knows no tokenizer."""

    nats_per_token: float
    bits_per_byte: float


@torch.no_grad()
def evaluate(
    model: "PreTrainedModel", text: HeldOut, *, packed: bool, check: Callable[[], None]
) -> Loss:
    """Return the loss of a model on held-out text.

    Args:
        packed: whether the model's attention takes the documents' boundaries.
        check: called between batches; may raise to end the evaluation.
    """
    training = model.training
    model.eval()
    try:
        nats = sum(_nats(model, batch, packed=packed, check=check) for batch in text.batches)
    finally:
        model.train(training)
    mean = nats / text.tokens
    return Loss(mean, mean / math.log(2) / text.bytes_per_token)


def _nats(
    model: "PreTrainedModel", batch: PackedBatch, *, packed: bool, check: Callable[[], None]
) -> float:
    check()
    inputs = on_device(batch.model_inputs(packed=packed), model.device)
    return model(**inputs).loss.item() * predicted_tokens(batch)
