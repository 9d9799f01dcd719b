import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    chunked_overlay,
)

from apical.hf import attention, explain, use_kernels

# two documents of five and seven tokens in one row
POSITIONS = torch.cat([torch.arange(5), torch.arange(7)])[None]
BOUNDS = torch.tensor([0, 5, 12], dtype=torch.int32)

REFUSED = {
    "no-interface": ("bloom", {}, "AttentionInterface"),
    "cross-attention": ("gpt2", {"add_cross_attention": True}, "cross-attention"),
    "encoder-decoder": ("t5", {}, "not"),
    # attention in chunks is there for a dense mask alone
    "chunks": ("llama4", {}, "Llama4TextModel declares no support for flash"),
    # every other kind of layer than full and windowed attention
    "kinds": ("qwen3_next", {}, "layers of kind linear_attention"),
    # neighbouring embeddings are joined
    "neighbours": ("mobilebert", {}, "mixes tokens of neighbouring documents"),
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


WRONG_BOUNDS = {
    # documents of a batch that was cut since
    "short": ([0, 5, 11], r"\[0, 5, 11\], expected boundaries .* with the 12 tokens"),
    "long": ([0, 5, 13], r"\[0, 5, 13\]"),
    "lengths": ([5, 7], r"\[5, 7\]"),
    "decreasing": ([0, 7, 5, 12], "do not decrease"),
    "empty": ([], r"\[\]"),
    "many": ([*range(12)], r"\[0, 1, 2, 3, ..., 11\]"),
}


@pytest.mark.parametrize("case", WRONG_BOUNDS)
def test_boundaries_that_do_not_fit_are_refused(build, case):
    bounds, message = WRONG_BOUNDS[case]
    model = use_kernels(build("llama"))
    with pytest.raises(ValueError, match=message):
        call(model, cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"cu_seq_lens_q": BOUNDS.float()}, "cu_seq_lens_q is torch.float32"),
        ({"cu_seq_lens_q": BOUNDS[None]}, r"of shape \(1, 3\), expected int32"),
        ({"cu_seq_lens_k": torch.tensor([0, 6, 12])}, "cu_seq_lens_k differs"),
        ({"seq_idx": torch.tensor([[0] * 6 + [1] * 6])}, "seq_idx changes elsewhere"),
    ],
    ids=["floats", "rows", "keys", "index"],
)
def test_contradictory_boundaries_are_refused(build, inputs, message):
    model = use_kernels(build("llama"))
    with pytest.raises(ValueError, match=message):
        call(model, **{"cu_seq_lens_q": BOUNDS} | inputs)


def test_boundaries_of_one_row_do_not_stand_for_all(build):
    model = use_kernels(build("llama"))
    with pytest.raises(ValueError, match="with the 24 tokens of the batch"):
        model(torch.randint(3, 61, (2, 12)), cu_seq_lens_q=BOUNDS)


def test_padding_inside_a_window_is_refused(build, batch):
    inputs, _ = batch("hole")
    model = use_kernels(build("mistral-window"))
    for use_cache in (False, True):
        with pytest.raises(NotImplementedError, match=r"padding inside a document.* 4 columns"):
            model(**inputs, use_cache=use_cache)
    # every token sees all others all the same
    use_kernels(build("mistral", sliding_window=12))(**inputs)


def test_padding_between_documents_is_not_inside_a_window(build):
    model = build("mistral-window", torch.float64)
    ids = torch.randint(3, 61, (1, 12))
    mask = torch.ones_like(ids)
    mask[:, 6:8] = 0
    positions = torch.cat([torch.arange(8), torch.arange(4)])[None]
    alone = model(ids[:, 8:]).logits
    packed = use_kernels(model)(ids, attention_mask=mask, position_ids=positions).logits
    assert (packed[:, 8:] - alone).abs().max() <= 1e-10


def test_attention_weights_asked_for_by_the_configuration_are_refused(build):
    model = use_kernels(build("llama"))
    # as a checkpoint may bring it
    model.config._output_attentions = True
    with pytest.raises(NotImplementedError, match="output_attentions"):
        call(model)


def test_checkpointing_a_family_that_keeps_arguments_is_refused(build, checkpointed):
    model = use_kernels(build("stablelm")).train()
    assert "no gradient checkpointing: StableLmDecoderLayer" in explain(model)
    checkpointed(model)
    loss = call(model, labels=torch.randint(3, 61, (1, 12))).loss
    with pytest.raises(NotImplementedError, match="do not checkpoint"):
        loss.backward()


def test_nothing_stays_behind_a_call_that_fails(build):
    model = use_kernels(build("stablelm"))
    with pytest.raises(IndexError):
        model(torch.full((1, 12), 61))
    layer = model.model.layers[0].self_attn
    assert not [name for name in vars(layer) if name.startswith("_apical")]


def test_own_mask_functions_are_refused():
    with pytest.raises(NotImplementedError, match="function of its own"):
        attention.padding_mask(use_vmap=True)
    # transformers' own, that nothing tells attention about
    for overlay in (chunked_overlay(4, torch.zeros(1)), blockwise_overlay(torch.zeros(1, 4))):
        mask_function = and_masks(overlay, causal_mask_function)
        with pytest.raises(NotImplementedError, match=r"own \((chunk|block)"):
            attention.padding_mask(mask_function=mask_function)


def test_a_layer_without_its_model_is_refused(build):
    model = use_kernels(build("llama"))
    states = torch.randn(1, 4, 32)
    rotary = model.model.rotary_emb(states, torch.arange(4)[None])
    with pytest.raises(NotImplementedError, match="without the documents"):
        model.model.layers[0](states, position_embeddings=rotary)
