import pytest
import torch
from transformers import DynamicCache

from apical.hf import attention, explain, use_kernels

# two documents of five and seven tokens in one row
POSITIONS = torch.cat([torch.arange(5), torch.arange(7)])[None]
BOUNDS = torch.tensor([0, 5, 12], dtype=torch.int32)

REFUSED = {
    # sliding windows and soft-capped scores
    "gemma2": ("gemma2", {}, "sliding_attention"),
    "softcap": ("gemma2", {"layer_types": ["full_attention"] * 2}, "attn_logit_softcapping=50"),
    "window": ("mistral", {"sliding_window": 4}, "sliding_window=4"),
    "dropout-llama": ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    "dropout-gpt2": ("gpt2", {"attn_pdrop": 0.1}, "attn_pdrop=0.1"),
    "dropout-bert": ("bert", {"attention_probs_dropout_prob": 0.1}, "attention_probs_dropout"),
    "no-interface": ("bloom", {}, "AttentionInterface"),
    "cross-attention": ("gpt2", {"add_cross_attention": True}, "cross-attention"),
    # its layers take no keyword arguments: the documents would never arrive
    "dropped-arguments": ("stablelm", {}, "keeps the documents"),
    "encoder-decoder": ("t5", {}, "not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernel_lacks_is_refused_and_changes_nothing(build, case):
    name, options, reason = REFUSED[case]
    model = build(name, **options)
    before = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=f"{type(model).__name__}.*{reason}"):
        use_kernels(model, loss=False)
    assert model.config._attn_implementation == before
    assert reason in explain(model).splitlines()[1]


def call(model, **inputs):
    return model(torch.randint(3, 61, (1, 12)), **inputs)


def filled(model) -> DynamicCache:
    cache = DynamicCache()
    call(model, past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"output_attentions": True}, NotImplementedError, "output_attentions"),
        ({"attention_mask": torch.ones(1, 1, 12, 12)}, NotImplementedError, "2-D attention_mask"),
        ({"position_ids": POSITIONS.expand(3, 1, 12)}, NotImplementedError, "position_ids"),
        ({"attention_mask": torch.ones(1, 11)}, ValueError, r"\(1, 11\), expected \(1, 12\)"),
        (
            {"attention_mask": (POSITIONS > 0).long(), "cu_seq_lens_q": BOUNDS},
            ValueError,
            "attention_mask has zeros although cu_seq_lens_q",
        ),
        ({"position_bias": torch.ones(1)}, NotImplementedError, "position_bias"),
        # any tensor that reaches the layers unknown may be one that changes attention
        ({"head_scales": torch.ones(4)}, NotImplementedError, "head_scales"),
    ],
    ids=["weights", "4-D", "3-axes", "short", "both", "bias", "unknown"],
)
def test_calls_beyond_the_kernel_are_refused(build, inputs, error, message):
    model = use_kernels(build("llama"))
    with pytest.raises(error, match=message):
        call(model, **inputs)


@pytest.mark.parametrize("packing", ["position_ids", "cu_seq_lens_q"])
def test_packed_rows_on_a_filled_cache_are_refused(build, packing):
    model = use_kernels(build("llama"))
    inputs = {packing: {"position_ids": POSITIONS + 12, "cu_seq_lens_q": BOUNDS}[packing]}
    with pytest.raises(NotImplementedError, match="filled cache"):
        call(model, past_key_values=filled(model), **inputs)


def test_dropout_switched_on_later_is_refused(build):
    model = use_kernels(build("llama")).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    call(model.eval())
    with pytest.raises(NotImplementedError, match=r"dropout=0\.5"):
        call(model.train())


def test_own_mask_functions_are_refused():
    with pytest.raises(NotImplementedError, match="function of its own"):
        attention.padding_mask(use_vmap=True)


def test_a_layer_without_its_model_is_refused(build):
    model = use_kernels(build("llama"))
    states = torch.randn(1, 4, 32)
    rotary = model.model.rotary_emb(states, torch.arange(4)[None])
    with pytest.raises(NotImplementedError, match="without the documents"):
        model.model.layers[0](states, position_embeddings=rotary)
