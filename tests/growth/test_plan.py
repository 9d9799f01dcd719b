import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2Config

from apical.growth.maps import LinearMap, SpaceMap
from apical.growth.operators import RandomDepth, Stack, Widen, ZeroDepth
from apical.growth.plan import Fill, GrowthPlan, LayerSource

_LLAMA = {"model_type": "llama", "num_hidden_layers": 3}
_TERMS = st.tuples(st.integers(0, 200), st.floats(-4, 4))
_LAYERS = st.builds(
    LayerSource,
    terms=st.lists(_TERMS, min_size=1, max_size=3).map(tuple),
    zero=st.lists(st.sampled_from(["mlp.down_proj.weight", "a.bias"]), unique=True).map(tuple),
    own=st.dictionaries(st.just("a.weight"), st.lists(_TERMS, min_size=1).map(tuple)),
    random=st.booleans(),
)
_COPIES = st.lists(st.integers(-1, 3), min_size=1, max_size=9)
_MAPS = st.builds(
    lambda new, weight: SpaceMap(LinearMap.of(4, new), LinearMap.of(4, new, weight)),
    _COPIES,
    st.floats(0.125, 4),
)
_PLANS = st.builds(
    GrowthPlan,
    operator=st.sampled_from(["stack", "zero-depth", "an operator of later"]),
    options=st.dictionaries(
        st.text("ab_", max_size=5), st.integers() | st.floats(0, 1) | st.booleans()
    ),
    model_type=st.sampled_from(["llama", "olmo2"]),
    layers=st.lists(_LAYERS, min_size=1, max_size=20).map(tuple),
    spaces=st.dictionaries(st.sampled_from(["ffn", "hidden"]), _MAPS),
    fill=st.none() | st.builds(Fill, std=st.floats(0, 1), seed=st.integers(0, 9)),
    notes=st.lists(st.text("ab ", max_size=9), max_size=2).map(tuple),
    preserves_function=st.booleans(),
)


@given(_PLANS)
def test_a_plan_comes_back_from_yaml_and_json(plan):
    assert GrowthPlan.from_yaml(plan.to_yaml()) == plan
    assert GrowthPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@given(_PLANS)
def test_every_plan_prints_as_a_short_table(plan):
    lines = str(plan).splitlines()
    assert lines[0].startswith(f"{plan.operator}(")
    spaces = len(plan.spaces) + 1 if plan.spaces else 0
    assert 3 <= len(lines) - spaces - len(plan.notes) <= 14


_EMPTY = {"terms": [], "zero": [], "own": {}, "random": False}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param({"layer": []}, "'layer'", id="a key too many"),
        pytest.param({"layers": []}, "layers is empty", id="no layers"),
        pytest.param({"layers": [_EMPTY]}, "without terms", id="no terms"),
    ],
)
def test_plans_that_make_no_sense_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        GrowthPlan.from_dict(Stack().plan(_LLAMA).to_dict() | change)


def test_a_missing_key_is_named():
    data = Stack().plan(_LLAMA).to_dict()
    del data["operator"]
    with pytest.raises(ValueError, match="'operator'"):
        GrowthPlan.from_dict(data)


def test_a_run_of_layers_is_one_row():
    assert str(Stack(2).plan(_LLAMA)).splitlines() == [
        "stack(factor=2): llama, 6 layers from 3; the function changes",
        "new layer  old layer    set to zero",
        "      0-2  0-2",
        "      3-5  0-2",
        "note: blocks that follow each other were not trained to",
    ]


def test_zeroed_weights_and_sums_are_printed():
    layers = (LayerSource(((0, 1.0),)), LayerSource(((0, 0.5), (1, 0.25)), ("a", "b")))
    plan = GrowthPlan("mix", {}, "llama", layers, preserves_function=True)
    assert str(plan).splitlines() == [
        "mix(): llama, 2 layers from 2; the function is preserved",
        "new layer  old layer    set to zero",
        "        0  0",
        "        1  0 × 0.5 + 1 × 0.25  a, b",
    ]


@pytest.mark.parametrize(
    "text", ["a: [", "- 1", "", "layers"], ids=["cut", "a list", "none", "text"]
)
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match=r"^the plan is "):
        GrowthPlan.from_yaml(text)


def test_random_layers_and_spaces_are_printed():
    config = _LLAMA | {"hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2}
    lines = str(RandomDepth(2).plan(config)).splitlines()
    assert lines[3] == "      3-5  random"
    lines = str(Widen(ffn=9).plan(config)).splitlines()
    assert lines[3:] == [
        "    space  size",
        "      ffn  6 -> 9       1 to 2 copies, read × 0.5 to 1",
    ]
    lines = str(Widen(ffn=9, new="zero").plan(config)).splitlines()
    assert lines[-1] == "      ffn  6 -> 9       3 carry nothing"
    lines = str(Widen(ffn=12).plan(config).inverse()).splitlines()
    assert lines[-2] == "      ffn  12 -> 6       sums of 2, × 0.5"


def test_long_tables_leave_out_the_middle():
    lines = str(ZeroDepth(2).plan(_LLAMA | {"num_hidden_layers": 30})).splitlines()
    assert [line.split()[:2] for line in lines[-3:]] == [["9", "4"], ["…", "49"], ["59", "29"]]


def test_sources_follow_the_layers():
    plan = ZeroDepth(2).plan(_LLAMA)
    up, down = "mlp.up_proj.weight", "mlp.down_proj.weight"
    assert plan.sources("lm_head.weight") == ((("lm_head.weight", 1.0),), False, False)
    assert plan.sources(f"model.layers.5.{up}") == (((f"model.layers.2.{up}", 1.0),), False, False)
    assert plan.sources(f"model.layers.5.{down}") == (
        ((f"model.layers.2.{down}", 1.0),),
        True,
        False,
    )
    assert plan.sources(f"model.layers.4.{down}") == (
        ((f"model.layers.2.{down}", 1.0),),
        False,
        False,
    )
    with pytest.raises(ValueError, match="no layer of the plan, which has 6"):
        plan.sources(f"model.layers.6.{up}")


def test_names_are_those_of_the_grown_model_without_derived_ones():
    old = ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    old += [f"model.layers.{layer}.a.weight" for layer in range(3)]
    new = [f"model.layers.{layer}.a.weight" for layer in range(6)]
    assert list(Stack(2).plan(_LLAMA).names(old)) == ["lm_head.weight", *new]


def test_config_keys_that_follow_depth_grow_and_the_others_stay():
    kinds = ["full_attention", "full_attention", "sliding_attention"]
    config = {**_LLAMA, "layer_types": kinds, "max_window_layers": 2, "hidden_size": 8}
    grown = Stack(2).plan(config).grown_config(config)
    assert grown == config | {
        "num_hidden_layers": 6,
        "layer_types": kinds * 2,
        "max_window_layers": 4,
    }
    assert config["num_hidden_layers"] == 3


@pytest.mark.parametrize("window", [0, 2, 3, 28], ids=["all", "some", "none", "default, unused"])
def test_window_count_agrees_with_the_list_where_it_can(window):
    config = Qwen2Config(
        num_hidden_layers=3, use_sliding_window=True, max_window_layers=window
    ).to_dict()
    grown = ZeroDepth(3).plan(config).grown_config(config)
    counted = Qwen2Config.from_dict({k: v for k, v in grown.items() if k != "layer_types"})
    assert counted.layer_types == grown["layer_types"]
