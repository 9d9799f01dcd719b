"""Every family of transformers that calls the attention interface, as a tiny random model."""

import copy

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from apical.hf import explain, padding, use_kernels

_NAMES = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_MASKED_LM_MAPPING_NAMES
_LENGTH = 12
# what a configuration has of these is made small; rows are shorter than positions go, a packed row
# is longer
_SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "dim", "d_model", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim", "dff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_experts_per_token"), 2),
    **{"vocab_size": 61, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    **{"num_key_value_heads": 2, "head_dim": 8, "word_embed_proj_dim": 32},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
}
_MIXED = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": None, "num_key_value_heads": 4}
_LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}

# families, and the options that make them small and typical
_GROUPS = [
    # causal, all layers alike
    ("apertus arcee biogpt bitnet cohere ctrl diffllama ernie4_5 gemma glm glm4 gpt2", {}),
    ("gpt_bigcode gpt_neox granite helium hrm_text hyperclovax internlm3 iquestcoder", {}),
    ("jais2 llama ministral3 nanochat olmo olmo2 opt persimmon phi qwen2 qwen3 seed_oss", {}),
    ("smollm3 stablelm", {}),
    ("lfm2", {"layer_types": ["full_attention"] * 2}),
    ("nemotron hunyuan_v1_dense", {"head_dim": 8}),
    # windows in all layers, in some; soft caps; sinks
    ("mistral phi3 starcoder2 mixtral", {"sliding_window": 4}),
    ("cohere2 cwm exaone4 gemma2 gemma3_text granite_swa ministral modernbert-decoder", _MIXED),
    ("olmo3 vaultgemma", _MIXED),
    ("gemma4_text", _MIXED | {"global_head_dim": 16, "vocab_size_per_layer_input": 61}),
    # experts
    ("aria_text dots1 ernie4_5_moe flex_olmo glm4_moe granitemoe granitemoeshared", {}),
    ("hunyuan_v1_moe hy_v3 jetmoe laguna mellum minimax_m2 olmoe phimoe qwen2_moe", {}),
    ("qwen3_moe solar_open", {}),
    ("afmoe beam cohere2_moe exaone_moe flint gpt_oss granitemoe_swa kolibri1", _MIXED),
    ("mimo_v2_flash", _MIXED),
    # values of another size than keys
    ("axk1 deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 youtu", _LATENT),
    # looking both ways
    ("albert bert bert-generation distilbert electra ernie eurobert gte", {}),
    ("jina_embeddings_v3 nomic_bert", {}),
    ("roc_bert", {"pronunciation_vocab_size": 31, "shape_vocab_size": 31}),
    ("modernbert ultrabert", _MIXED),
    # positions from ids
    ("camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl", {}),
]
_FAMILIES = {family: options for families, options in _GROUPS for family in families.split()}


def test_every_family_that_is_packed_whole_is_tried():
    assert set(_FAMILIES) == set(padding._RULES)


def tiny(family: str):
    """Return a small random model with large weights: what a token attends to must show."""
    config_class = transformers.CONFIG_MAPPING[family]
    own = set(dir(config_class())) | set(config_class.attribute_map)
    options = {name: value for name, value in _SMALL.items() if name in own} | _FAMILIES[family]
    config = config_class(**{k: v for k, v in options.items() if v is not None})
    torch.manual_seed(0)
    model = getattr(transformers, _NAMES[family])(config)
    if model._can_set_experts_implementation():
        # the others have no float64
        model.set_experts_implementation("eager")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if getattr(model.config, "attn_logit_softcapping", None):
        # older versions take a kernel that has no cap
        model.set_attn_implementation("eager")
    # eager attention takes its softmax in float32, where the mask of float64 overflows
    return model if model.config._attn_implementation == "eager" else model.double()


def with_kernels(model):
    return use_kernels(copy.deepcopy(model), loss=False)


@pytest.fixture(params=_FAMILIES, scope="module")
def pair(request):
    """A stock model and the same one with the kernels in."""
    if request.param not in transformers.CONFIG_MAPPING:
        pytest.skip(f"{request.param} is not in transformers {transformers.__version__}")
    stock = tiny(request.param)
    if not stock._can_set_attn_implementation():
        pytest.skip(f"{request.param} calls no interface in {transformers.__version__}")
    return stock.eval(), with_kernels(stock).eval()


def bound_of(model) -> float:
    # norms and rotary embeddings round to float32 in every family
    return 1e-5 if model.dtype == torch.float64 else 2e-4


def logits_and_gradients(model, inputs, kept: torch.Tensor):
    logits = model(**inputs, use_cache=False).logits[kept]
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(logits.shape, generator=generator)
    (logits * weights.to(logits)).sum().backward()
    return logits.detach(), [p.grad for p in model.parameters()]


def test_padded_rows_equal_stock_and_skip_their_padding(pair):
    stock, ours = pair
    assert "padding is left out of all layers" in explain(ours)
    mask = torch.ones(3, _LENGTH, dtype=torch.long)
    # padding on the left, on the right, none: more tokens than there are positions
    mask[0, :5] = mask[1, 9:] = 0
    ids = torch.randint(3, 61, mask.shape).masked_fill(mask == 0, 1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    theirs, their_gradients = logits_and_gradients(stock, inputs, mask.bool())
    seen: list[torch.Tensor] = []
    ours.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mine, my_gradients = logits_and_gradients(ours, inputs, mask.bool())
    assert seen[0].shape == (1, mask.sum())
    bound = bound_of(stock)
    assert (mine - theirs).abs().max() <= bound * theirs.abs().max()
    largest = max(grad.abs().max() for grad in their_gradients if grad is not None)
    for my_gradient, their_gradient in zip(my_gradients, their_gradients, strict=True):
        assert (my_gradient is None) == (their_gradient is None)
        if my_gradient is not None:
            assert (my_gradient - their_gradient).abs().max() <= bound * largest


@torch.no_grad()
def test_packed_documents_equal_documents_alone(pair):
    stock, ours = pair
    # longer than a window, one token, shorter
    lengths = [9, 1, 3]
    # after the padding token's own
    first = 2 if padding._RULES[stock.config.model_type] == "id" else 0
    positions = torch.cat([torch.arange(first, first + n) for n in lengths])[None]
    ids = torch.randint(3, 61, positions.shape)
    alone = torch.cat([stock(piece).logits for piece in ids.split(lengths, 1)], 1)
    packed = ours(ids, position_ids=positions).logits
    assert (packed - alone).abs().max() <= bound_of(stock) * alone.abs().max()
