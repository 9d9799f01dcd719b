import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from apical.growth.apply import grow
from apical.growth.operators import OPERATORS, Coalesce, Stack, Widen, ZeroDepth
from apical.growth.plan import GrowthPlan, LayerSource
from apical.growth.saved_plan import SavedPlan
from apical.growth.shards import grow_checkpoint

_SHORT = [torch.float8_e4m3fn, torch.float8_e5m2]
# three layers cannot be joined in pairs
_OPTIONS = {"coalesce": Coalesce(depth=1)}
_ALL = {name: _OPTIONS.get(name) or kind() for name, kind in OPERATORS.items()}


@pytest.mark.parametrize("operator", _ALL.values(), ids=_ALL)
def test_disk_and_live_model_grow_alike(checkpoint, family, tokens, tmp_path, operator, tensors):
    model, source = checkpoint(family)
    plan = grow_checkpoint(source, tmp_path / "big", operator)
    live = grow(model, operator)
    assert plan == operator.plan(model.config.to_dict())
    expected = dict(live.named_parameters())
    written = tensors(tmp_path / "big")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, expected[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "big")
    assert type(loaded) is type(model)
    for key in ("num_hidden_layers", "layer_types", "max_window_layers", "tie_word_embeddings"):
        assert getattr(loaded.config, key, None) == getattr(live.config, key, None), key
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, live(tokens).logits)


def test_zero_on_disk_preserves_the_function(checkpoint, family, tokens, tmp_path):
    model, source = checkpoint(family, dtype=torch.float64)
    grow_checkpoint(source, tmp_path / "big", ZeroDepth(3))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "big")
    assert loaded.dtype == torch.float64
    with torch.no_grad():
        old, new = model(tokens).logits, loaded(tokens).logits
    assert (new - old).abs().max() <= 1e-10 * old.abs().max()


@pytest.mark.parametrize("family", ["llama-tied", "gpt2-tied", "bert-tied"])
def test_models_without_a_head(checkpoint, run, tmp_path, family):
    model, source = checkpoint(family, head="")
    grow_checkpoint(source, tmp_path / "big", Widen(ffn=256))
    loaded, info = AutoModel.from_pretrained(tmp_path / "big", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    old = run(model)
    # float32 sums of twice as many terms
    assert (run(loaded.eval()) - old).abs().max() <= 1e-4 * old.abs().max()


def test_every_dtype_is_kept_bit_for_bit(saved, tmp_path, tensors):
    old = load_file(saved / "model.safetensors")
    dtypes = itertools.cycle([torch.bfloat16, torch.float16, torch.float32, torch.float64, *_SHORT])
    old = {n: t.to(dtype) for (n, t), dtype in zip(old.items(), dtypes, strict=False)}
    # a payload in a NaN and a negative zero would not survive arithmetic
    old["model.norm.weight"] = torch.tensor([0x7FC12345, -(2**31)] * 16, dtype=torch.int32)
    old["model.norm.weight"] = old["model.norm.weight"].view(torch.float32)
    save_file(old, saved / "model.safetensors", metadata={"format": "pt"})
    plan = grow_checkpoint(saved, tmp_path / "big", Stack())
    for name, tensor in tensors(tmp_path / "big").items():
        source = old[plan.sources(name).terms[0][0]]
        assert tensor.dtype == source.dtype
        assert torch.equal(tensor.view(torch.uint8), source.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("dtype", _SHORT)
def test_widths_of_8_bits_grow_through_float32(saved, tmp_path, tensors, dtype):
    old = {n: t.to(dtype) for n, t in load_file(saved / "model.safetensors").items()}
    wide = tmp_path / "wide"
    wide.mkdir()
    (wide / "config.json").write_bytes((saved / "config.json").read_bytes())
    save_file({n: t.float() for n, t in old.items()}, wide / "model.safetensors")
    save_file(old, saved / "model.safetensors")
    operator = Widen(hidden=48, heads=6, kv_heads=3)
    grow_checkpoint(saved, tmp_path / "big", operator)
    grow_checkpoint(wide, tmp_path / "big in float32", operator)
    expected = tensors(tmp_path / "big in float32")
    written = tensors(tmp_path / "big")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].to(dtype).view(torch.uint8))


def test_8_bits_that_overflow_become_the_largest_number(saved, tmp_path, tensors):
    old = load_file(saved / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    old = {n: t.to(torch.float8_e4m3fn) for n, t in old.items()}
    old[name] = torch.full_like(old[name].float(), 448).to(torch.float8_e4m3fn)
    save_file(old, saved / "model.safetensors")
    plan = GrowthPlan("twice", {}, "llama", tuple(LayerSource(((i, 2.0),)) for i in range(3)))
    grow_checkpoint(saved, tmp_path / "big", _Fixed(plan))
    # 448 is the largest number of the type, and 2 * 448 would be NaN
    assert bool((tensors(tmp_path / "big")[name].float() == 448).all())


class _Fixed:
    def __init__(self, plan):
        self._plan = plan

    def plan(self, config):
        return self._plan


def test_sums_of_different_dtypes_are_refused(saved, tmp_path):
    old = load_file(saved / "model.safetensors")
    old["model.layers.1.mlp.up_proj.weight"] = old["model.layers.1.mlp.up_proj.weight"].half()
    save_file(old, saved / "model.safetensors")
    pairs = (LayerSource(((0, 0.5), (2, 0.5))), LayerSource(((0, 0.5), (1, 0.5))))
    plan = GrowthPlan("pairs", {}, "llama", pairs)
    with pytest.raises(ValueError, match=r"sum of .* in torch.float32 and .*layers\.1.*float16"):
        grow_checkpoint(saved, tmp_path / "big", _Fixed(plan))
    assert not list(tmp_path.glob("big*"))


def test_a_tied_head_that_is_stored_twice_stays_so(saved, tmp_path, tensors):
    old = load_file(saved / "model.safetensors")
    old["lm_head.weight"] = old["model.embed_tokens.weight"].clone()
    save_file(old, saved / "model.safetensors", metadata={"format": "pt"})
    grow_checkpoint(saved, tmp_path / "big", Stack())
    assert "lm_head.weight" in tensors(tmp_path / "big")


def test_frequencies_of_old_checkpoints_are_dropped(saved, tmp_path, tensors):
    old = load_file(saved / "model.safetensors")
    old["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(old, saved / "model.safetensors")
    grow_checkpoint(saved, tmp_path / "big", Stack())
    assert not any("inv_freq" in name for name in tensors(tmp_path / "big"))


def test_configs_that_leave_out_what_is_the_default(checkpoint, tokens, tmp_path):
    model, source = checkpoint("qwen2-window-from-layer-2")
    config = json.loads((source / "config.json").read_text())
    del config["layer_types"]  # as written by releases before transformers 4.53
    (source / "config.json").write_text(json.dumps(config | {"a_key_of_ours": [1]}))
    grow_checkpoint(source, tmp_path / "big", Stack())
    grown = json.loads((tmp_path / "big" / "config.json").read_text())
    assert grown["a_key_of_ours"] == [1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "big")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, grow(model, Stack())(tokens).logits)


@pytest.mark.parametrize("file", ["plan.yaml", "apical_growth.json"])
def test_a_saved_plan_grows_the_same_again(saved, tmp_path, tensors, file):
    plan = grow_checkpoint(saved, tmp_path / "big", Widen(hidden=48, heads=6, kv_heads=3))
    again = grow_checkpoint(saved, tmp_path / "again", SavedPlan(tmp_path / "big" / file))
    assert again == plan
    first, second = tensors(tmp_path / "big"), tensors(tmp_path / "again")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("family", "operator", "match"),
    [
        ("mistral-window", Stack(), "model_type llama, this one has mistral"),
        ("llama-every-bias", Widen(ffn=96), "ffn 48, this one has 24"),
        ("llama-every-bias", Stack(), "layers at least 3, this one has 2"),
    ],
)
def test_plans_of_other_models_are_refused(checkpoint, saved, tmp_path, family, operator, match):
    grow_checkpoint(saved, tmp_path / "big", operator)
    _, other = checkpoint(family, name="other")
    config = json.loads((other / "config.json").read_text())
    changes = {"intermediate_size": 24, "num_hidden_layers": 2}
    (other / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=match):
        grow_checkpoint(other, tmp_path / "no", SavedPlan(tmp_path / "big" / "plan.yaml"))


def test_plans_that_are_none(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no file; expected a plan in YAML"):
        grow_checkpoint(saved, tmp_path / "big", SavedPlan(tmp_path / "plan.yaml"))
    (tmp_path / "plan.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="the plan is a list"):
        grow_checkpoint(saved, tmp_path / "big", SavedPlan(tmp_path / "plan.yaml"))
