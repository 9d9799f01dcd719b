import copy
import gc
import io
import json
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from apical.hf import explain, use_kernels

IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(3))


def step(model) -> list[torch.Tensor]:
    """Return loss, logits and gradients of one training step, to be compared bitwise."""
    model.train().zero_grad()
    out = model(IDS, labels=IDS)
    out.loss.backward()
    return [out.loss.detach(), out.logits.detach(), *(p.grad.clone() for p in model.parameters())]


def hooks(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(m, name)) for m in model.modules() for name in names)


def is_patched(model) -> bool:
    """Whether training is fused and packed documents are kept apart."""
    ids, positions = IDS[:1], torch.arange(12)[None] % 6
    alone = model.eval()(ids[:, 6:]).logits
    packed = model(ids, position_ids=positions).logits[:, 6:]
    fused = model.train()(IDS, labels=IDS).logits is None
    model.eval()
    return fused and bool((packed - alone).abs().max() < 1e-5)


def test_the_same_model_comes_back(build):
    model = build("llama")
    assert use_kernels(model) is model
    assert is_patched(model)


def test_reverting_restores_the_stock_model_bitwise(build, causal):
    stock = build(causal)
    expected, implementation = step(stock), stock.config._attn_implementation
    stock_hooks, stock_attributes = hooks(stock), set(vars(stock))
    use_kernels(stock)
    use_kernels(stock, attention=False, loss=False)
    assert stock.config._attn_implementation == implementation
    assert (hooks(stock), set(vars(stock))) == (stock_hooks, stock_attributes)
    for ours, theirs in zip(step(stock), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_former_choice_of_attention_comes_back(build):
    model = build("llama")
    model.set_attn_implementation("eager")
    use_kernels(model)
    assert use_kernels(model, attention=False).config._attn_implementation == "eager"


def test_a_later_choice_of_attention_stays(build):
    model = use_kernels(build("llama"))
    model.set_attn_implementation("eager")
    assert "eager   llama: chosen by set_attn_implementation" in explain(model)
    torch.testing.assert_close(model(IDS).logits, build("llama")(IDS).logits)
    assert use_kernels(model, attention=False).config._attn_implementation == "eager"


def test_each_part_is_given_back_alone(build):
    model = use_kernels(build("llama")).train()
    use_kernels(model, loss=False)
    assert model.config._attn_implementation == "apical"
    assert model(IDS, labels=IDS).logits is not None
    use_kernels(model, attention=False)
    assert model.config._attn_implementation == "sdpa"
    assert model(IDS, labels=IDS).logits is None


def test_twice_is_once(build):
    once, twice = use_kernels(build("llama")), use_kernels(use_kernels(build("llama")))
    assert hooks(once) == hooks(twice)
    assert explain(once) == explain(twice)
    use_kernels(twice, attention=False, loss=False)
    assert hooks(twice) == hooks(build("llama"))


def test_a_second_instance_of_the_same_configuration_is_untouched(build):
    stock = build("llama")
    # one configuration object, shared by both
    twin = type(stock)(stock.config)
    twin.load_state_dict(stock.state_dict())
    expected = step(stock)
    use_kernels(twin)
    for ours, theirs in zip(step(stock), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert stock.config._attn_implementation == "sdpa"
    assert hooks(stock) == 0


def test_what_cannot_be_replaced_stays_and_the_rest_is_replaced(build):
    model = build("llama")
    # not the vocabulary of the configuration
    model.lm_head = nn.Linear(32, 64)
    assert use_kernels(model).config._attn_implementation == "apical"
    assert model(IDS).logits.shape == (2, 12, 64)
    assert "the head has 64 rows, but config.vocab_size is 61" in explain(model)


def test_nothing_to_replace_is_an_error_that_names_model_and_way_out(build):
    with pytest.raises(NotImplementedError, match=r"BloomForCausalLM.*without use_kernels"):
        use_kernels(build("bloom"), loss=False)


def test_asking_for_nothing_is_no_error(build):
    use_kernels(build("bloom"), attention=False, loss=False)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None], ids=["module", "none"])
@pytest.mark.parametrize("function", [use_kernels, explain])
def test_other_objects_are_refused(function, model):
    with pytest.raises(ValueError, match="expected a transformers PreTrainedModel"):
        function(model)


def test_negative_z_loss_is_refused(build):
    model = build("llama")
    with pytest.raises(ValueError, match="z_loss is -1"):
        use_kernels(model, z_loss=-1)
    assert hooks(model) == 0


def test_explain_is_a_table(build):
    model = build("llama")
    assert explain(model).splitlines() == [
        "part       active  why",
        "attention  sdpa    llama: not asked for: call apical.use_kernels(model)",
        "loss       stock   llama: not asked for: call apical.use_kernels(model)",
    ]
    assert explain(use_kernels(model, z_loss=0.1)).splitlines() == [
        "part       active  why",
        "attention  apical  llama: varlen_attention, no attention across packed documents;"
        " padding is left out of all layers",
        "loss       apical  llama: linear_cross_entropy in training, without logits; z_loss=0.1",
    ]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_saved_model_is_stock(build, tmp_path, name):
    model = use_kernels(build(name))
    model.save_pretrained(tmp_path)
    assert "apical" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    # two kernels, each up to 8e-6 from the logits in float64, which reach 6
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    use_kernels(model, attention=False, loss=False)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def through_pickle(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_copies_are_patched_and_independent(build, duplicate):
    model = use_kernels(build("llama"))
    other = duplicate(model)
    assert is_patched(other)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    # a copy whose hooks still held the first model would compute its loss
    loss = other.train()(IDS, labels=IDS).loss
    torch.testing.assert_close(loss, torch.tensor(61.0).log())
    use_kernels(other, attention=False, loss=False)
    assert hooks(other) == 0
    assert is_patched(model)


def test_a_patched_model_is_freed_at_once(build):
    model = use_kernels(build("llama")).train()
    model(IDS, labels=IDS).loss.backward()
    weight = weakref.ref(model.lm_head.weight)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_import_without_transformers_is_one_line(monkeypatch):
    import importlib
    import sys

    for name in [name for name in sys.modules if name.startswith("apical.hf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'apical\[hf\]'"):
        importlib.import_module("apical.hf")
