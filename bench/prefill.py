"""Prefill of prompts of many lengths: packed, against padded batches and what else one would do."""

import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from race import Case, Lineup, Outputs, Peer
from torch import Tensor

import apical
from apical.packing import pack

log = logging.getLogger(__name__)

# logits, keys and values of two ways to compute the same, relative to their norm
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# batches of prompts sorted by length
_SORTED = 8

# prompts, typical length, spread of its logarithm, shortest, longest: log-normal and synthetic
_MIXES = {
    "few": (6, 12, 0.8, 2, 48),
    # exam questions by themselves, as the original's MMLU batches of 64: it gives no statistics,
    # and the spread of this mix is our choice
    "questions": (64, 60, 0.8, 8, 512),
    # the same after five examples: mean and bounds are MMLU's 3212 (985 to 14626) characters in
    # evalscope's table of its benchmarks, at 4 characters per token; the spread is our choice
    "five-shot": (16, 680, 0.55, 246, 3656),
}


@dataclass(frozen=True)
class Size:
    """A model and its prompts."""

    mix: str
    width: int
    layers: int
    vocabulary: int
    dtype: torch.dtype


def test_prefill(case: Case, race: Callable[[Lineup], object]) -> None:
    race(case.build())


def cases(*, quick: bool, device: str) -> list[Case]:
    """Return the races: logits of the next token and a padded cache of the same prompts."""
    if importlib.util.find_spec("transformers") is None:
        log.warning("prefill: not run, transformers is not installed")
        return []
    if quick:
        sizes = [Size("few", 64, 2, 512, torch.float32)]
    elif device == "cuda":
        sizes = [Size(mix, 2048, 16, 32000, torch.bfloat16) for mix in ("questions", "five-shot")]
    else:
        sizes = [Size(mix, 256, 4, 8192, torch.float32) for mix in ("questions", "five-shot")]
    return [Case(f"llama-{size.mix}", functools.partial(_lineup, size, device)) for size in sizes]


def _lengths(mix: str) -> list[int]:
    """Return the lengths of the prompts, the same on every machine."""
    count, typical, spread, low, high = _MIXES[mix]
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return (noise * spread + math.log(typical)).exp().round().clamp(low, high).int().tolist()


def _model(size: Size, device: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.width * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 64,
        num_key_value_heads=size.width // 64,
        max_position_embeddings=4096,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    return model.to(device, size.dtype).eval()


class _Block(NamedTuple):
    """Prompts that went through one forward, in the order of its logits."""

    numbers: list[int]
    rows: list[int]
    starts: list[int]


class _Stock:
    """A model as transformers runs it: logits, keys and values of one block after the other."""

    def __init__(self, model: Any, prompts: Sequence[Tensor]) -> None:
        self.model = model
        self.lengths = [len(prompt) for prompt in prompts]
        self.prompts = [prompt.to(model.device) for prompt in prompts]

    def batches(self, count: int) -> Peer:
        """Return the prompts in this many left-padded batches, sorted by length."""
        order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        size = math.ceil(len(order) / count)
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        return self._peer([self._padded(group) for group in groups])

    def bins(self) -> Peer:
        """Return the original: rows as long as the longest prompt, under one mask each."""
        packs = pack(self.lengths, max(self.lengths))
        row = [number for number, numbers in enumerate(packs) for _ in numbers]
        starts = [
            s for n in packs for s in accumulate((self.lengths[i] for i in n[:-1]), initial=0)
        ]
        block = _Block([number for numbers in packs for number in numbers], row, starts)
        ids, document = self._filled(block, rows=len(packs), columns=max(self.lengths))
        own = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
        # padding sees itself: a row without keys would be nan, and nan reaches every key
        same = (document[:, :, None] == document[:, None]) & (document[:, None] > 0)
        mask = (same.tril() | own)[:, None]
        return self._peer([(block, ids, {"attention_mask": mask}, _positions(document))])

    def _padded(self, numbers: list[int]) -> "_Call":
        columns = max(self.lengths[number] for number in numbers)
        starts = [columns - self.lengths[number] for number in numbers]
        block = _Block(numbers, list(range(len(numbers))), starts)
        ids, document = self._filled(block, rows=len(numbers), columns=columns)
        mask = (document > 0).long()
        # without a mask, causal attention takes its faster path
        options = {} if min(starts) == max(starts) else {"attention_mask": mask}
        return block, ids, options, _positions(document)

    def _filled(self, block: _Block, *, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return token ids, and the number of the prompt plus one at each of its tokens."""
        ids, document = torch.zeros(2, rows, columns, dtype=torch.long, device=self.model.device)
        for number, row, start in zip(*block, strict=True):
            where = slice(start, start + self.lengths[number])
            ids[row, where], document[row, where] = self.prompts[number], number + 1
        return ids, document

    def _peer(self, calls: Sequence["_Call"]) -> Peer:
        unpack = functools.partial(self._unpacked, [block for block, *_ in calls])
        # one batch of all prompts is what was asked for, its padding aside
        whole = sum(ids.shape[0] for _, ids, _, _ in calls) == len(self.lengths) and len(calls) == 1

        @torch.no_grad()
        def call() -> Outputs:
            outputs = tuple(x for one in calls for x in self._forward(*one))
            return outputs if whole else unpack(outputs)

        computed = sum(ids.numel() for _, ids, _, _ in calls) / sum(self.lengths)
        return Peer(call, unpack=unpack if whole else None, expected=computed)

    def _forward(
        self, block: _Block, ids: Tensor, options: dict[str, Tensor], positions: Tensor
    ) -> Outputs:
        out = self.model.model(ids, position_ids=positions, use_cache=True, **options)
        ends = [s + self.lengths[n] - 1 for n, s in zip(block.numbers, block.starts, strict=True)]
        last = out.last_hidden_state[block.rows, ends]
        return self.model.lm_head(last), *_states(out.past_key_values)

    def _unpacked(self, blocks: Sequence[_Block], outputs: Outputs) -> Outputs:
        """Return logits (B, V), keys and values (B, K, L, D), zero at padding."""
        count, columns = len(outputs) // len(blocks), max(self.lengths)
        whole = [outputs[0].new_zeros(len(self.lengths), outputs[0].shape[1])]
        for states in outputs[1:count]:
            heads, _, size = states.shape[1:]
            whole.append(states.new_zeros(len(self.lengths), heads, columns, size))
        for i_block, block in enumerate(blocks):
            logits, *states = outputs[i_block * count : (i_block + 1) * count]
            whole[0][block.numbers] = logits
            for target, source in zip(whole[1:], states, strict=True):
                for number, row, start in zip(*block, strict=True):
                    length = self.lengths[number]
                    target[number, :, columns - length :] = source[row, :, start : start + length]
        return tuple(whole)


# prompts, their rows (B, L), options of the forward, positions (B, L)
_Call = tuple[_Block, Tensor, dict[str, Tensor], Tensor]


def _positions(document: Tensor) -> Tensor:
    """Return positions that restart with each document (B, L)."""
    columns = torch.arange(document.shape[1], device=document.device).expand(document.shape)
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[:, 1:] = document.diff() != 0
    return columns - (columns * begins).cummax(1).values


def _states(cache: Any) -> list[Tensor]:
    return [states for layer in cache.layers for states in (layer.keys, layer.values)]


def _lineup(size: Size, device: str) -> Lineup:
    from apical.hf.prefill import prepack

    lengths, generator = _lengths(size.mix), torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, size.vocabulary, (n,), generator=generator) for n in lengths]
    with_kernels = apical.use_kernels(_model(size, device), loss=False)

    def ours() -> Outputs:
        prefilled = prepack(with_kernels, prompts)
        return prefilled.logits, *_states(prefilled.past_key_values)

    stock = _Stock(_model(size, device), prompts)
    one_by_one = stock.batches(len(prompts))
    parameters = sum(p.numel() for p in with_kernels.model.layers.parameters())
    return Lineup(
        ours=ours,
        peers={
            "padded batch": stock.batches(1),
            f"{_SORTED} batches by length": stock.batches(_SORTED),
            "one prompt at a time": one_by_one,
            "bins under a mask": stock.bins(),
            "padded batch, our attention": _Stock(with_kernels, prompts).batches(1),
        },
        what=(
            f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in"
            f" all, {len(lengths) * max(lengths)} with padding; Llama of {size.layers} layers,"
            f" width {size.width}; {str(size.dtype).removeprefix('torch.')}; logits of the next"
            " token and the padded cache."
        ),
        # no padding and no packing that could be wrong
        truth=one_by_one.call,
        tolerance=_TOLERANCE[size.dtype],
        # the layers' products; attention besides
        flops=2 * parameters * sum(lengths),
        dtype=str(size.dtype).removeprefix("torch."),
    )
