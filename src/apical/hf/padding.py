"""Padded batches without their padding: one packed row through all layers, and back."""

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from .layout import Layout, Padding

# how a family counts positions where none are given: columns, padding included; tokens of the mask;
# ids that are no padding. Checked family by family in tests/hf/test_families.py
_BY_COLUMN = """
afmoe albert apertus arcee aria_text axk1 beam bert bert-generation biogpt bitnet cohere cohere2
cohere2_moe ctrl cwm deepseek_v2 deepseek_v3 diffllama distilbert dots1 electra ernie ernie4_5
ernie4_5_moe eurobert exaone4 exaone_moe flex_olmo flint gemma gemma2 gemma3_text gemma4_text glm
glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe
granitemoe_swa granitemoeshared gte helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3
hyperclovax internlm3 iquestcoder jais2 jetmoe jina_embeddings_v3 kolibri1 laguna lfm2 llama
mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mixtral modernbert
modernbert-decoder nanochat nemotron nomic_bert olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe
qwen2 qwen2_moe qwen3 qwen3_moe roc_bert seed_oss smollm3 solar_open stablelm starcoder2 ultrabert
vaultgemma youtu
"""
_BY_TOKEN = "opt"
_BY_ID = "camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl"
_RULES = {
    family: rule
    for rule, families in (("column", _BY_COLUMN), ("token", _BY_TOKEN), ("id", _BY_ID))
    for family in families.split()
}
# rotary embeddings that depend on the longest row, padding included
_ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})


def packing_refusal(body: PreTrainedModel) -> str | None:
    """Return why a model cannot run on one packed row in place of padded rows, or None."""
    config = body.config
    if config.model_type not in _RULES or not type(body).__module__.startswith("transformers."):
        return f"positions of {config.model_type} under padding are not known"
    if ropes := sorted(_rope_types(config) & _ROPE_BY_LENGTH):
        return f"{' and '.join(ropes)} rotary positions depend on the padded length"
    if isinstance(getattr(body, "pooler", None), nn.Linear):
        return "the pooler reads the first token of each row by itself"
    return None


def pack(
    body: PreTrainedModel, names: Container[str], arguments: Mapping[str, Any], layout: Layout
) -> tuple[dict[str, Any], Layout] | None:
    """Return a body's arguments for one packed row and its layout, or None if rows stay padded.

    Args:
        names: of the parameters of the body's forward.
        arguments: what it was called with.
    """
    if layout.tokens is None or not len(layout.tokens) or _wants_rows(body, arguments):
        return None
    shape = layout.batch, layout.length
    positions = _positions(body, arguments, shape).to(layout.device).expand(shape)
    given = dict(arguments) | {"attention_mask": None, "position_ids": positions}
    if any(_is_batch(x) and x.shape[:2] != shape for x in given.values()):
        return None
    packed = {n: _gather(x, layout.tokens) if _is_batch(x) else x for n, x in given.items()}
    if "use_cache" in names:
        packed["use_cache"] = False
    return packed, layout.packed()


def unpack(body: Any, out: Any, padding: Padding) -> Any:
    """Return a body's output as padded rows, zero at padding."""
    if isinstance(out, ModelOutput):
        found = {n: _scatter(x, padding) for n, x in out.items() if n != "pooler_output"}
        if out.get("pooler_output") is not None:
            # the packed row has one first token, the rows have one each
            found["pooler_output"] = body.pooler(found["last_hidden_state"])
        return type(out)(**found)
    return type(out)(_scatter(x, padding) for x in out)


def _rope_types(config: PreTrainedConfig) -> set[str]:
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]
    return {kind["rope_type"] for kind in kinds if kind.get("rope_type")}


def _wants_rows(body: PreTrainedModel, arguments: Mapping[str, Any]) -> bool:
    """Whether something goes in or comes out that has to have a row per row of the batch."""
    # prepared by generate, for a cache
    if (
        isinstance(arguments["attention_mask"], dict)
        or arguments.get("past_key_values") is not None
    ):
        return True
    # a tuple does not say what in it is pooled
    tuples = False in (arguments.get("return_dict"), getattr(body.config, "return_dict", True))
    if tuples and getattr(body, "pooler", None) is not None:
        return True
    cache = arguments.get("use_cache")
    if cache is None:
        # in training only if it is asked for
        cache = not body.training and getattr(body.config, "use_cache", False)
    return bool(cache) and _is_decoder(body)


def _is_decoder(body: PreTrainedModel) -> bool:
    return any(getattr(module, "is_causal", False) for module in body.modules())


def _positions(
    body: PreTrainedModel, arguments: Mapping[str, Any], shape: tuple[int, int]
) -> Tensor:
    """Return the positions (B or 1, S) that the body would give its tokens."""
    given, ids = arguments.get("position_ids"), arguments.get("input_ids")
    if given is not None:
        return given
    rule, mask = _RULES[body.config.model_type], arguments["attention_mask"]
    if rule == "token":
        return mask.long().cumsum(1) - 1
    columns = torch.arange(shape[1], device=mask.device)[None]
    if rule == "column":
        return columns
    embeddings: Any = body.embeddings
    if ids is None:
        return columns + embeddings.padding_idx + 1
    return embeddings.create_position_ids_from_input_ids(ids, embeddings.padding_idx)


def _is_batch(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _gather(values: Tensor, tokens: Tensor) -> Tensor:
    return values.flatten(0, 1).index_select(0, tokens.to(values.device))[None]


def _scatter(value: Any, padding: Padding) -> Any:
    if isinstance(value, tuple):
        return tuple(_scatter(item, padding) for item in value)
    if not isinstance(value, Tensor):
        return value
    tokens = padding.tokens.to(value.device)
    count, size = len(tokens), padding.batch * padding.length
    if value.shape[:1] == (count,) and value.ndim == 2:
        # routers see tokens without a batch
        return value.new_zeros(size, *value.shape[1:]).index_copy(0, tokens, value)
    if value.shape[:2] != (1, count):
        return value
    rows = value.new_zeros(size, *value.shape[2:]).index_copy(0, tokens, value[0])
    return rows.unflatten(0, (padding.batch, padding.length))
