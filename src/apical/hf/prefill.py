"""Prepacking: prompts packed for their prefill, and out of it the cache of the padded batch."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..packing import document_bounds, pack, position_ids
from .attention import NAME
from .unpacking import Places, Unpacking, last_columns

# tokens per forward where nothing else is said: enough to keep a large device busy, and few enough
# for the activations of a 7B model to stay well below a gigabyte
_TOKENS = 4096


@dataclass(frozen=True, eq=False, repr=False)
class Prefilled:
    """B prompts after their prefill, as the left-padded batch of L columns would leave them.

    To decode by hand, go on as after a prefill by ``model(...)``: the next tokens follow from
    `logits`, stand at `position_ids` and see `past_key_values` and themselves. Keys and values of
    the prompts stay in memory as long as this object, whatever is decoded from it.
    """

    model: PreTrainedModel
    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) int64, 0 for padding
    position_ids: Tensor  # (B, 1) int64, of the next token
    logits: Tensor  # (B, V), for the next token
    _layers: list[Unpacking]

    @cached_property
    def past_key_values(self) -> DynamicCache:
        """Keys and values of all prompts, zero at padding: one object, which grows by decoding."""
        return self._cache(withheld=0)

    def generate(self, **options: Any) -> Any:
        """Return what ``model.generate`` returns for the padded batch, without its prefill.

        Can be called any number of times. The last token of each prompt is computed once more:
        generate begins with a forward of its own.

        Args:
            options: those of ``model.generate``, but input_ids, attention_mask, past_key_values.
        """
        cache = self._cache(withheld=1)
        config = options.get("generation_config") or self.model.generation_config
        names = ("num_beams", "num_return_sequences")
        copies = max(options.get(name) or getattr(config, name, None) or 1 for name in names)
        if copies > 1:
            # generate repeats its inputs for beams and samples, but not the cache that it is given
            cache.batch_repeat_interleave(copies)
        return self.model.generate(  # pyright: ignore[reportCallIssue] - a mixin of language models
            self.input_ids,
            attention_mask=self.attention_mask,
            past_key_values=cache,
            **options,
        )

    def _cache(self, *, withheld: int) -> DynamicCache:
        """Return a cache of all columns but the last `withheld`; it shares memory, copies none."""
        cache = DynamicCache(config=self.model.config)
        columns = self.input_ids.shape[1] - withheld
        for layer, unpacked in zip(cache.layers, self._layers, strict=True):
            if unpacked.stored is None:
                continue
            assert isinstance(layer, DynamicLayer)
            layer.lazy_initialization(*unpacked.stored)
            end = unpacked.width - withheld
            seen = slice(end - last_columns(layer, columns), end)
            layer.keys, layer.values = (states[:, :, seen] for states in unpacked.stored)
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = columns
        return cache


@torch.no_grad()
def prepack(
    model: PreTrainedModel,
    input_ids: Tensor | Iterable[Any],
    attention_mask: Tensor | Iterable[Any] | None = None,
    *,
    max_tokens: int | None = None,
) -> Prefilled:
    """Return prompts after their prefill, at the cost of their tokens: no padding is computed.

    The result holds what the left-padded batch would leave (a transformers cache, positions,
    logits), and generates: ``prepack(model, **tokenizer(texts)).generate(max_new_tokens=32)``.
    Only the last token of each prompt goes through the head. The model's mode is not changed.

    The original packs prompts into bins as long as the longest prompt, because its attention goes
    over whole bins under a mask, so that longer bins cost more. Here attention goes over documents:
    nothing is lost by a longer row and nothing is won by a second one. So each forward is one row
    of up to `max_tokens` tokens, which bounds the memory of activations. Each layer's keys and
    values move to the padded cache as soon as they are computed.

    Args:
        model: a causal language model with apical's attention: call ``use_kernels`` on it first,
            and again with ``attention=False`` afterwards to decode with its former attention.
        input_ids: token ids of B prompts: a list of lists or tensors, or (B, S), padded anywhere.
        attention_mask: 0 for padding, in the same form; None: every token counts.
        max_tokens: most tokens of a forward; None: 4096, or the longest prompt.

    Raises:
        ValueError: no prompts, a prompt without tokens or longer than `max_tokens`, ids that are
            no integers, a mask of another form, a model without apical's attention.
        NotImplementedError: the model takes no position_ids, logits_to_keep or past_key_values, or
            its cache holds something else than one key per token.

    Source: Zhao et al. 2024, arXiv:2404.09529.
    """
    _check_model(model)
    prompts = _prompts(input_ids, attention_mask)
    sizes = torch.tensor([len(prompt) for prompt in prompts])
    packs = pack(sizes, _capacity(sizes, max_tokens))
    columns = int(sizes.max())
    layers = [
        Unpacking(layer, batch=len(prompts), columns=columns)
        for layer in DynamicCache(config=model.config).layers
    ]
    rows = [_forward(model, prompts, numbers, columns, layers) for numbers in packs]
    if all(layer.stored is None for layer in layers):
        raise ValueError(
            f"{type(model).__name__} filled no cache; call model.eval() or turn off gradient"
            " checkpointing"
        )
    order = torch.tensor([number for numbers in packs for number in numbers]).argsort()
    mask = torch.arange(columns) >= columns - sizes[:, None]
    padded = torch.full(mask.shape, _pad_token(model))
    padded[mask] = torch.cat(prompts)
    return Prefilled(
        model=model,
        input_ids=padded.to(model.device),
        attention_mask=mask.long().to(model.device),
        position_ids=sizes[:, None].to(model.device),
        logits=torch.cat(rows)[order.to(rows[0].device)],
        _layers=layers,
    )


def _forward(
    model: PreTrainedModel,
    prompts: list[Tensor],
    numbers: list[int],
    columns: int,
    layers: list[Unpacking],
) -> Tensor:
    """Run one packed row of the prompts of these numbers; return their logits (n, V)."""
    row = [prompts[number] for number in numbers]
    sizes = torch.tensor([len(prompt) for prompt in row])
    positions = position_ids(sizes)
    # the last tokens of all prompts share the last column
    column = columns - sizes.repeat_interleave(sizes) + positions
    places = Places(torch.tensor(numbers).repeat_interleave(sizes), column, columns, model.device)
    for layer in layers:
        layer.places = places
    bounds = document_bounds(sizes).to(model.device)
    longest = int(sizes.max())
    return model(
        input_ids=torch.cat(row)[None].to(model.device),
        position_ids=positions[None].to(model.device),
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
        past_key_values=Cache(layers=[*layers]),
        use_cache=True,
        logits_to_keep=bounds[1:].long() - 1,
        return_dict=True,
    ).logits[0]


def _check_model(model: PreTrainedModel) -> None:
    active = model.config._attn_implementation
    if active != NAME:
        raise ValueError(
            f"the model attends by {active!r}, under which packed prompts would see each other;"
            " call apical.use_kernels(model, loss=False) first"
        )
    known = inspect.signature(model.forward).parameters
    for name in ("position_ids", "past_key_values", "logits_to_keep"):
        if name not in known:
            raise NotImplementedError(
                f"{type(model).__name__} takes no {name}; prefill it as a padded batch"
            )


def _prompts(
    input_ids: Tensor | Iterable[Any], attention_mask: Tensor | Iterable[Any] | None
) -> list[Tensor]:
    """Return the real tokens of each prompt, on the CPU."""
    rows = [_row(number, ids) for number, ids in enumerate(_on_host(input_ids))]
    if not rows:
        raise ValueError("input_ids holds no prompts, expected at least one")
    if attention_mask is not None:
        masks = [torch.as_tensor(mask) for mask in _on_host(attention_mask)]
        if [mask.shape for mask in masks] != [row.shape for row in rows]:
            raise ValueError(
                "attention_mask differs in form from input_ids, expected one entry per token"
            )
        rows = [row[mask.bool()] for row, mask in zip(rows, masks, strict=True)]
    for number, row in enumerate(rows):
        if len(row) == 0:
            raise ValueError(
                f"prompt {number} is empty, expected at least one token;"
                " drop it or begin it with the beginning-of-sequence token"
            )
    return rows


def _on_host(batch: Any) -> Any:
    # one transfer, not one per prompt
    return batch.cpu() if isinstance(batch, Tensor) else batch


def _row(number: int, ids: Any) -> Tensor:
    row = torch.as_tensor(ids).cpu()
    if row.ndim != 1 or (len(row) and row.is_floating_point()) or row.dtype == torch.bool:
        raise ValueError(
            f"prompt {number} is {row.ndim}-D of {row.dtype}, expected a list of integer token ids;"
            " pass a list of prompts or input_ids of shape (B, S)"
        )
    return row.long()


def _capacity(sizes: Tensor, max_tokens: int | None) -> int:
    longest = int(sizes.max())
    if max_tokens is None:
        return max(_TOKENS, longest)
    if max_tokens < longest:
        raise ValueError(
            f"max_tokens is {max_tokens}, but prompt {int(sizes.argmax())} has {longest} tokens;"
            " raise max_tokens or truncate the prompt"
        )
    return max_tokens


def _pad_token(model: PreTrainedModel) -> int:
    """Return the id that fills `input_ids`; no result depends on it."""
    config = getattr(model, "generation_config", None) or model.config
    ids = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
    found = next((token for token in ids if token is not None), 0)
    return found[0] if isinstance(found, list) else found
