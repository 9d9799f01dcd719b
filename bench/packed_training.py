"""Training steps of transformers models: documents packed with apical, against padded batches."""

import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from race import Call, Case, Lineup, Outputs, Peer
from torch import Tensor

import apical

log = logging.getLogger(__name__)

# loss and a gradient of two ways to compute the same step, relative to their norm
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Size:
    """A model and the documents of one step."""

    family: str
    width: int
    layers: int
    vocabulary: int
    documents: int
    longest: int
    dtype: torch.dtype


def test_packed_training(case: Case, race: Callable[[Lineup], object]) -> None:
    race(case.build())


def cases(*, quick: bool, device: str) -> list[Case]:
    """Return the races: one training step, forward and backward, on the same documents."""
    if importlib.util.find_spec("transformers") is None:
        log.warning("packed_training: not run, transformers is not installed")
        return []
    found = []
    for family in ("llama", "bert"):
        if quick:
            size = Size(family, 64, 2, 512, 6, 64, torch.float32)
        elif device == "cuda":
            size = Size(family, 1024, 12, 32000, 48, 2048, torch.bfloat16)
        else:
            size = Size(family, 256, 4, 8192, 16, 512, torch.float32)
        found.append(Case(f"{family}-step", functools.partial(_lineup, size, device)))
    return found


def _lengths(size: Size) -> list[int]:
    """Return lengths whose mean is about 0.3 of the longest, log-normal."""
    noise = torch.randn(size.documents, generator=torch.Generator().manual_seed(0))
    lengths = (noise * 0.8 + math.log(0.23 * size.longest)).exp().round()
    return [*lengths.clamp(8, size.longest).int().tolist()[1:], size.longest]


def _model(size: Size, device: str) -> Any:
    import transformers

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // 64,
        "max_position_embeddings": size.longest,
    }
    if size.family == "llama":
        config = transformers.LlamaConfig(
            **shape, num_key_value_heads=size.width // 64, intermediate_size=size.width * 11 // 4
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        dropout: dict[str, Any] = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
        config = transformers.BertConfig(**shape, **dropout, intermediate_size=4 * size.width)
        model = transformers.BertForMaskedLM(config)
    return cast(Any, model).to(device, size.dtype).train()


def _documents(size: Size, lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Return ids and labels of each document; BERT has labels on 15 % of the tokens."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        ids = torch.randint(1, size.vocabulary, (length,), generator=generator)
        labels = ids.clone()
        labels[0] = -100
        if size.family == "bert":
            labels[torch.rand(length, generator=generator) >= 0.15] = -100
        found.append((ids, labels))
    return found


def _padded(documents: list[tuple[Tensor, Tensor]], device: str) -> dict[str, Tensor]:
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids = [one for one, _ in documents]
    return {
        "input_ids": pad(ids).to(device),
        "labels": pad([labels for _, labels in documents], padding_value=-100).to(device),
        "attention_mask": pad([torch.ones_like(one) for one in ids]).to(device),
    }


def _step(model: Any, batch: Mapping[str, Any]) -> Call:
    weight = next(
        p for name, p in model.named_parameters() if "layers.0" in name or "layer.0" in name
    )

    def call() -> Outputs:
        model.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        assert weight.grad is not None
        return loss.detach()[None], weight.grad

    return call


def _lineup(size: Size, device: str) -> Lineup:
    lengths = _lengths(size)
    documents = _documents(size, lengths)
    padded = _padded(documents, device)
    row = apical.PackedCollator()([{"input_ids": i, "labels": target} for i, target in documents])
    packed = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in row.items()}
    ours, stock = apical.use_kernels(_model(size, device)), _model(size, device)
    # without a cache, and with positions alone, transformers keeps Llama's documents apart;
    # BERT's it lets see each other, so that is no peer
    positions = {name: packed[name] for name in ("input_ids", "labels", "position_ids")}
    by_mask = Peer(_step(stock, positions | {"use_cache": False}), expected=4)
    T, N = sum(lengths), len(lengths)
    parameters = sum(p.numel() for p in ours.parameters())
    dtype = str(size.dtype).removeprefix("torch.")
    what = (
        f"{size.family}: {size.layers} layers of width {size.width}, {parameters / 1e6:.1f} M"
        f" parameters, {size.vocabulary} words; {N} documents, {T} tokens, mean / longest"
        f" {T / N / max(lengths):.2f}; {dtype}; forward and backward."
    )
    return Lineup(
        ours=_step(ours, packed),
        peers={
            "padded batch, stock": Peer(_step(stock, padded), expected=4),
            "padded batch, apical": _step(ours, padded),
            "packed by positions, stock": by_mask
            if size.family == "llama"
            else Peer(reason="transformers lets packed documents see each other in BERT"),
        },
        what=what,
        truth=_step(stock, padded),
        tolerance=_TOLERANCE if size.dtype == torch.float32 else 5e-2,
        flops=6 * parameters * T,
        dtype=dtype,
    )
