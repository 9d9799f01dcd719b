import copy
import logging
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaForQuestionAnswering

import apical
from apical.growth.apply import grow
from apical.growth.mapping import summed
from apical.growth.operators import LinearExpand, RandomDepth, Stack, Widen, ZeroDepth
from apical.growth.plan import TensorSource


def _stacked_by_hand(model, factor):
    """Build the stacked model from transformers alone: one list of layers, repeated."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers *= factor
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types * factor
    stacked = AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()
    stacked.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    stacked.model.norm.load_state_dict(model.model.norm.state_dict())
    stacked.lm_head.load_state_dict(model.lm_head.state_dict())
    for new, layer in enumerate(stacked.model.layers):
        layer.load_state_dict(model.model.layers[new % len(model.model.layers)].state_dict())
    return stacked


@pytest.mark.parametrize("factor", [2, 3], ids=["default", "three times"])
def test_stack_equals_a_model_built_by_hand(tiny, family, tokens, factor):
    model = tiny(family)
    grown, by_hand = grow(model, Stack(factor)), _stacked_by_hand(model, factor)
    with torch.no_grad():
        assert torch.equal(grown(tokens).logits, by_hand(tokens).logits)
        assert not torch.equal(grown(tokens).logits, model(tokens).logits)
    assert grown.config.num_hidden_layers == 3 * factor
    assert grown.state_dict().keys() == by_hand.state_dict().keys()


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize("factor", [2, 3], ids=["default", "two copies"])
def test_zero_preserves_the_function(tiny, family, tokens, dtype, bound, factor):
    model = tiny(family, dtype=dtype)
    grown = grow(model, ZeroDepth(factor))
    with torch.no_grad():
        old, new = model(tokens).logits, grown(tokens).logits
    assert (new - old).abs().max() <= bound * old.abs().max()
    assert len(grown.model.layers) == 3 * factor


_OPERATORS = {
    "layers copied": Stack(),
    "some silent": ZeroDepth(),
    "some random": RandomDepth(),
    "layers mixed": LinearExpand(),
    "wider": Widen(),
}


@pytest.mark.parametrize("operator", _OPERATORS.values(), ids=_OPERATORS)
def test_the_grown_model_owns_its_storage_and_the_source_is_unchanged(tiny, family, operator):
    model = tiny(family)
    before = copy.deepcopy(model)
    rng = torch.get_rng_state()
    grown = grow(model, operator)
    assert torch.equal(torch.get_rng_state(), rng)
    pointers = [p.data_ptr() for p in grown.parameters()]
    assert len({*pointers, *(p.data_ptr() for p in model.parameters())}) == len(pointers) + len(
        list(model.parameters())
    )
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter.fill_(7)
    grown.config.vocab_size = 1
    grown.generation_config.max_length = 3
    assert model.config.to_dict() == before.config.to_dict()
    assert model.generation_config == before.generation_config
    for (name, new), old in zip(
        model.state_dict().items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(new, old), name


@pytest.mark.parametrize("family", ["llama-tied", "mistral-window"], ids=["tied", "untied"])
def test_ties_are_kept_as_they_are(tiny, family):
    grown = grow(tiny(family), Stack())
    tied = grown.lm_head.weight is grown.model.embed_tokens.weight
    assert tied == (family == "llama-tied") == grown.config.tie_word_embeddings


def test_a_head_that_was_given_weights_of_its_own_keeps_them(tiny, tokens):
    model = tiny("llama-tied")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    with torch.no_grad():
        assert torch.equal(grow(model, ZeroDepth())(tokens).logits, model(tokens).logits)


def test_class_modes_and_dtypes_are_kept(tiny, tokens):
    model = tiny("qwen3-head-norms-wide-heads", dtype=torch.bfloat16).train()
    model.model.norm.float()
    model.model.embed_tokens.requires_grad_(False)
    model.generation_config.max_new_tokens = 17
    grown = grow(model, Stack())
    assert type(grown) is type(model)
    assert grown.training
    assert all(module.training for module in grown.modules())
    assert {p.dtype for p in grown.model.layers.parameters()} == {torch.bfloat16}
    assert grown.model.norm.weight.dtype == torch.float32
    assert grown.config.dtype == torch.bfloat16
    assert [n for n, p in grown.named_parameters() if not p.requires_grad] == [
        "model.embed_tokens.weight"
    ]
    assert grown.generation_config.max_new_tokens == 17
    assert not grow(model.eval(), Stack()).training


def test_rotary_buffers_are_fresh_and_right(tiny):
    model = tiny("llama-no-groups-yarn")
    expected = dict(AutoModelForCausalLM.from_config(model.config).named_buffers())
    model.model.rotary_emb.inv_freq.zero_()  # as a long prompt may have changed it
    buffers = dict(grow(model, Stack()).named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name]), name


def test_the_grown_model_trains_and_generates(tiny, tokens):
    grown = grow(tiny("llama-tied"), ZeroDepth()).train()
    grown(tokens, labels=tokens).loss.backward()
    silent = grown.model.layers[1].mlp
    assert silent.down_proj.weight.grad.abs().max() > 0
    assert silent.up_proj.weight.grad.abs().max() == 0
    assert grown.eval().generate(tokens[:1], max_new_tokens=2, do_sample=False).shape == (1, 13)


def test_a_model_with_kernels_grows_into_a_plain_one(tiny, tokens):
    model = tiny("llama-tied")
    with torch.no_grad():
        plain = grow(model, Stack())(tokens).logits
    apical.use_kernels(model)
    grown = grow(model, Stack())
    assert model.config._attn_implementation == "apical"
    assert grown.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(grown(tokens).logits, plain)
    apical.use_kernels(grown)


def test_a_chosen_attention_is_kept(tiny):
    model = tiny("llama-tied")
    model.set_attn_implementation("eager")
    assert grow(model, Stack()).config._attn_implementation == "eager"


def test_sums_of_layers_are_weighted_and_squared():
    old = {
        "a": torch.full((2,), 3.0, dtype=torch.bfloat16),
        "b": torch.ones(2, dtype=torch.bfloat16),
    }
    source = TensorSource((("a", 0.5), ("b", -2.0)), zero=False)
    assert summed(source, old.__getitem__).tolist() == [-0.5, -0.5]
    assert summed(source, old.__getitem__, power=2).tolist() == [4.75, 4.75]
    assert summed(source, old.__getitem__).dtype == torch.bfloat16
    halved = TensorSource((("a", 0.5),), zero=False)
    assert summed(halved, old.__getitem__).tolist() == [1.5, 1.5]
    assert old["a"].tolist() == [3.0, 3.0]


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(ValueError, match="model is a Linear; expected a transformers model"):
        grow(cast(Any, torch.nn.Linear(2, 2)), Stack())


def test_unknown_families_are_refused():
    model = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2)
    )
    with pytest.raises(NotImplementedError, match="'bloom' has no table"):
        grow(model, Stack())


def test_a_head_without_a_table_is_named(tiny):
    model = LlamaForQuestionAnswering(tiny("llama-every-bias").config)
    with pytest.raises(ValueError, match=r"52 unexpected: .*transformer\.embed_tokens"):
        grow(model, Stack())


@pytest.mark.parametrize("head", ["", "SequenceClassification"], ids=["none", "classifier"])
def test_models_with_another_head_grow(tiny, any_family, head, run, double):
    if head and any_family == "vit":
        pytest.skip("its usual head is a classifier")
    model = tiny(any_family, head=head, dtype=torch.float64)
    wider, deeper = grow(model, Widen()), grow(model, Stack())
    old, new = run(model), run(wider)
    if not head and new.shape != old.shape:  # OPT projects its last state to what it was
        # every direction of the old one twice, times what a tied head would need
        first, second = new.chunk(2, -1)
        assert torch.allclose(first, second, rtol=1e-10, atol=0)
        new = first / (first / old).median()
    assert (new - old).abs().max() <= 1e-10 * old.abs().max()
    assert type(deeper) is type(wider) is type(model)
    assert deeper.config.num_hidden_layers == 2 * model.config.num_hidden_layers


class _Warnings(logging.Handler):
    """Collects what transformers warns of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def warned():
    handler = _Warnings()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)


@pytest.mark.parametrize("operator", [Widen(), Stack()], ids=["wider", "deeper"])
def test_a_saved_grown_model_loads_with_plain_transformers(
    tiny, any_family, operator, run, tmp_path, warned
):
    model = tiny(any_family)
    grown = grow(model, operator)
    grown.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not warned
    assert torch.equal(run(loaded), run(grown))
    assert loaded.state_dict().keys() == grown.state_dict().keys()


@pytest.mark.parametrize("family", ["gpt2-tied", "gemma2-tied", "opt-tied", "mixtral"])
def test_grown_decoders_generate(tiny, family, tokens):
    grown = grow(tiny(family), Widen())
    asked = {"input_ids": tokens[:1], "attention_mask": torch.ones_like(tokens[:1])}
    kept = grown.generate(**asked, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    again = grown.generate(
        **asked, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=False
    )
    assert kept.shape == (1, 14)
    assert torch.equal(kept, again)


_EXPERTS = ["mixtral", "qwen2-moe", "qwen3-moe-tied"]


@pytest.mark.parametrize("family", _EXPERTS)
@pytest.mark.parametrize("factor", [2, 3], ids=["default", "two copies"])
def test_zero_depth_keeps_what_mixtures_of_experts_compute(tiny, family, factor, run, double):
    model = tiny(family, dtype=torch.float64)
    grown = grow(model, ZeroDepth(factor))
    assert (run(grown) - run(model)).abs().max() <= 1e-10 * run(model).abs().max()
    silent = grown.model.layers[1].mlp.experts
    assert silent.down_proj.abs().max() == 0
    assert torch.equal(silent.gate_up_proj, model.model.layers[0].mlp.experts.gate_up_proj)


@pytest.mark.parametrize("family", _EXPERTS)
def test_stacked_mixtures_of_experts_are_bit_for_bit(tiny, family):
    model = tiny(family, dtype=torch.bfloat16).train()
    model.model.layers[1].mlp.experts.requires_grad_(False)
    grown = grow(model, Stack())
    assert grown.training
    assert (grown.lm_head.weight is grown.model.embed_tokens.weight) == (family == _EXPERTS[2])
    for new, layer in enumerate(grown.model.layers):
        source = model.model.layers[new % 2]
        pairs = zip(layer.named_parameters(), source.parameters(), strict=True)
        for (name, parameter), old in pairs:
            assert torch.equal(parameter, old), name
            assert parameter.dtype == torch.bfloat16
            assert parameter.requires_grad == old.requires_grad, name


def test_weights_that_are_not_in_memory_are_refused(tiny):
    with pytest.raises(ValueError, match="meta device"):
        grow(tiny("llama-tied").to("meta"), Stack())
