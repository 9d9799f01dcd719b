"""What operators plan, against the formulas of their papers."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from apical.growth.apply import grow
from apical.growth.operators import (
    OPERATORS,
    AdvancedKnowledge,
    Interleave,
    LinearExpand,
    Overlap,
    RandomDepth,
    Stack,
    StackTop,
    ZeroDepth,
    progressive,
    progressive_top,
)
from apical.growth.plan import GrowthPlan, LayerSource

_SILENT = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
_DEPTH = [Stack, Interleave, ZeroDepth, RandomDepth]
_LAYERS = st.integers(1, 40)


def _llama(depth=3, **rest):
    return {
        "model_type": "llama",
        "num_hidden_layers": depth,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        **rest,
    }


def _sources(plan):
    assert all(len(layer.terms) == 1 and layer.terms[0][1] == 1 for layer in plan.layers)
    return [layer.terms[0][0] for layer in plan.layers]


@given(old=_LAYERS, more=_LAYERS)
def test_stack_repeats_the_block_sequence(old, more):
    plan = Stack(layers=old + more).plan(_llama(old))
    assert _sources(plan) == [new % old for new in range(old + more)]
    assert not any(layer.zero for layer in plan.layers)
    assert not plan.preserves_function


@given(old=_LAYERS, more=_LAYERS)
def test_interleave_keeps_layers_in_order_and_copies_even(old, more):
    sources = _sources(Interleave(layers=old + more).plan(_llama(old)))
    assert sources == [new * old // (old + more) for new in range(old + more)]
    counts = [sources.count(at) for at in range(old)]
    assert max(counts) - min(counts) <= 1


@given(old=_LAYERS, factor=st.integers(2, 4))
def test_whole_factors_are_division_with_and_without_remainder(old, factor):
    new = range(factor * old)
    assert _sources(Stack(factor).plan(_llama(old))) == [at % old for at in new]
    assert _sources(Interleave(factor).plan(_llama(old))) == [at // factor for at in new]
    assert _sources(ZeroDepth(factor).plan(_llama(old))) == [at // factor for at in new]


@given(old=_LAYERS, more=_LAYERS)
def test_zero_depth_keeps_each_layer_once_and_silences_its_copies(old, more):
    plan = ZeroDepth(layers=old + more).plan(_llama(old))
    sources = _sources(plan)
    assert sources == sorted(sources)
    assert [at for at, layer in zip(sources, plan.layers, strict=True) if not layer.zero] == [
        *range(old)
    ]
    assert {layer.zero for layer in plan.layers} == {(), _SILENT}
    assert plan.preserves_function


@given(groups=st.integers(1, 8), size=st.integers(1, 5))
def test_every_group_of_layers_is_followed_by_one_silent_copy(groups, size):
    plan = ZeroDepth(every=size).plan(_llama(groups * size))
    expected = []
    for group in range(groups):
        inside = range(group * size, (group + 1) * size)
        expected += [(at, ()) for at in inside] + [(inside[-1], _SILENT)]
    zeros = [layer.zero for layer in plan.layers]
    assert list(zip(_sources(plan), zeros, strict=True)) == expected


def test_zero_depth_silences_biases_only_where_they_are():
    biased = ZeroDepth().plan(_llama(attention_bias=True, mlp_bias=True)).layers[1].zero
    assert {"self_attn.o_proj.bias", "mlp.down_proj.bias"} < set(biased)


def test_zero_depth_refuses_a_normalised_stream(tiny):
    model = tiny("bert-tied")
    with pytest.raises(ValueError, match=r"no layer of a bert can add nothing.*use Stack"):
        grow(model, ZeroDepth())


@given(old=_LAYERS, data=st.data())
def test_overlap_drops_what_would_meet(old, data):
    drop = data.draw(st.integers(0, (old - 1) // 2))
    sources = _sources(Overlap(drop).plan(_llama(old)))
    assert sources == [*range(old - drop), *range(drop, old)]


def test_overlap_is_that_of_the_paper_unless_asked_otherwise():
    assert len(Overlap().plan(_llama(32)).layers) == 48


@given(old=_LAYERS, data=st.data())
def test_stack_top_copies_the_last_layers_and_trains_them_alone(old, data):
    add = data.draw(st.integers(1, old))
    operator = StackTop(add)
    assert _sources(operator.plan(_llama(old))) == [*range(old), *range(old - add, old)]
    trains = re.compile(operator.trains(_llama(old)))
    names = [f"model.layers.{at}.mlp.up_proj.weight" for at in range(old + add)]
    assert [bool(trains.match(name)) for name in names] == [False] * old + [True] * add
    assert not trains.match("model.embed_tokens.weight")


def test_progressive_schedules_lead_from_depth_to_depth():
    assert progressive((3, 6, 12)) == [Stack(layers=6), Stack(layers=12)]
    assert progressive_top((3, 6, 9)) == [StackTop(3), StackTop(3)]
    config = _llama(3)
    for operator, depth in zip(progressive((3, 6, 12)), (6, 12), strict=True):
        config = operator.plan(config).grown_config(config)
        assert config["num_hidden_layers"] == depth


@pytest.mark.parametrize("depths", [(), (3,), (3, 3), (6, 3), (0, 3)], ids=str)
def test_schedules_that_do_not_grow_are_refused(depths):
    with pytest.raises(ValueError, match="each above the one before"):
        progressive(depths)


@given(layers=_LAYERS)
def test_linear_expand_of_a_pair_is_the_formula(layers):
    plan = LinearExpand(layers, of="pair").plan(_llama(2))
    assert [dict(layer.terms) for layer in plan.layers] == [
        {0: 1.0, 1: at / layers} for at in range(1, layers + 1)
    ]


@given(layers=_LAYERS, old=st.integers(2, 12))
def test_linear_expand_of_the_ends_of_a_line_is_the_same_line(layers, old):
    base, slope = 3.0, -5.0  # theta_B and theta_A of a model that was trained on a line
    thetas = [base + at / old * slope for at in range(1, old + 1)]
    plan = LinearExpand(layers).plan(_llama(old))
    found = [sum(weight * thetas[at] for at, weight in layer.terms) for layer in plan.layers]
    assert found == pytest.approx([base + at / layers * slope for at in range(1, layers + 1)])
    if layers == old:
        assert [plan.layers[at].terms for at in (0, -1)] == [((0, 1.0),), ((old - 1, 1.0),)]


@pytest.mark.parametrize("where", ["top", "between"])
def test_random_layers_are_those_of_an_untrained_model(tiny, any_family, where):
    model = tiny(any_family)
    grown = grow(model, RandomDepth(2, where=where))
    plan = RandomDepth(2, where=where).plan(model.config.to_dict())
    fresh = [at for at, layer in enumerate(plan.layers) if layer.random]
    old = len(plan.layers) // 2
    assert fresh == ([*range(old, 2 * old)] if where == "top" else [*range(1, 2 * old, 2)])
    inside = [item for item in grown.state_dict().items() if f".{fresh[-1]}." in item[0]]
    assert inside
    for name, parameter in inside:
        if parameter.ndim == 1 and "norm" in name.lower().replace("ln_", "norm"):
            gain = 0.0 if name.endswith("bias") or "gemma" in any_family else 1.0
            assert torch.equal(parameter, torch.full_like(parameter, gain)), name
        elif parameter.ndim == 1:
            assert not parameter.any(), name
        else:
            # the deviation of n numbers is known to 1 / sqrt(2 n); no family here has another
            bound = 5 / (2 * parameter.numel()) ** 0.5
            assert float(parameter.std()) == pytest.approx(0.02, rel=bound), name


def test_random_layers_differ_and_follow_the_seed(tiny):
    model = tiny("llama-tied")
    one, same, other = (grow(model, RandomDepth(2, seed=seed)) for seed in (1, 1, 2))
    first, second = (one.model.layers[at].mlp.up_proj.weight for at in (4, 5))
    assert not torch.equal(first, second)
    assert torch.equal(first, same.model.layers[4].mlp.up_proj.weight)
    assert not torch.equal(first, other.model.layers[4].mlp.up_proj.weight)


def test_random_layers_on_disk_are_those_in_memory(tiny, tmp_path):
    from apical.growth.shards import grow_checkpoint

    model = tiny("llama-tied")
    model.save_pretrained(tmp_path / "small")
    grow_checkpoint(tmp_path / "small", tmp_path / "big", RandomDepth(2))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "big", dtype=torch.float32)
    for name, expected in grow(model, RandomDepth(2)).state_dict().items():
        assert torch.equal(found.state_dict()[name], expected), name


def test_advanced_knowledge_takes_new_directions_from_the_next_layer(tiny):
    model = tiny("llama-every-bias", dtype=torch.float64)
    grown = grow(model, AdvancedKnowledge(ffn=72))
    for at in range(3):
        ahead = min(at + 1, 2)  # the last layer has none after it
        mlp, old, later = (
            grown.model.layers[at].mlp,
            model.model.layers[at].mlp,
            model.model.layers[ahead].mlp,
        )
        for name in ("gate_proj", "up_proj"):
            rows = getattr(mlp, name).weight
            assert torch.equal(rows[:48], getattr(old, name).weight)
            assert torch.equal(rows[48:], getattr(later, name).weight[:24])
        # FPI's shares: what is read in two copies is read with half the weight
        halves = torch.tensor([0.5] * 24 + [1.0] * 24, dtype=torch.float64)
        assert torch.equal(mlp.down_proj.weight[:, :48], old.down_proj.weight * halves)
        assert torch.equal(mlp.down_proj.weight[:, 48:], old.down_proj.weight[:, :24] / 2)


def test_advanced_knowledge_of_equal_layers_keeps_the_function(tiny, any_family, run, double):
    model = tiny(any_family, dtype=torch.float64)
    plan = AdvancedKnowledge(factor=2).plan(model.config.to_dict())
    assert not plan.preserves_function
    assert plan.notes[0] == "new directions come from the next layer"
    assert _error(model, grow(model, plan), run) > 1e-6
    equal = GrowthPlan("repeat", {}, plan.model_type, (LayerSource(((1, 1.0),)),) * 3)
    model = grow(model, equal)
    again = AdvancedKnowledge(factor=2)
    assert _error(model, grow(model, again), run) <= 1e-10


def _error(old, new, run):
    return float((run(new) - run(old)).abs().max() / run(old).abs().max())


def test_ahead_is_every_copy_and_no_first_one():
    for space in AdvancedKnowledge(factor=1.5).plan(_llama()).spaces.values():
        sources, seen = space.carries.sources().tolist(), set()
        for at, source in enumerate(sources):
            assert space.ahead is not None
            assert bool(space.ahead[at]) == (source in seen)
            seen.add(source)


@pytest.mark.parametrize("operator", _DEPTH)
@pytest.mark.parametrize("factor", [1, 0, -2, 0.5, "2", True, float("inf"), float("nan")], ids=repr)
def test_factors_that_do_not_grow_are_refused(operator, factor):
    with pytest.raises(ValueError, match=r"^factor is .*; expected a number above 1$"):
        operator(factor)


@pytest.mark.parametrize("operator", _DEPTH)
@pytest.mark.parametrize(
    ("options", "depth", "match"),
    [
        pytest.param({"factor": 1.5}, 3, "makes 4.5 layers of 3; .*give layers", id="half a layer"),
        pytest.param({"layers": 3}, 3, "layers is 3, and the model has 3 already", id="no deeper"),
        pytest.param({"layers": 2}, 3, "layers is 2, and the model has 3 already", id="shrinks"),
        pytest.param({"layers": 0}, 3, "layers is 0; expected an integer", id="none"),
        pytest.param({"layers": 4.0}, 3, "layers is 4.0; expected an integer", id="no integer"),
        pytest.param({"factor": 2, "layers": 4}, 3, "expected one of the two", id="both"),
    ],
)
def test_depths_that_make_no_sense_are_refused(operator, options, depth, match):
    with pytest.raises(ValueError, match=match):
        operator(**options).plan(_llama(depth))


def test_a_factor_in_decimals_is_what_it_says():
    # 1.1 * 30 is 33.00000000000000003 in binary
    assert len(Stack(1.1).plan(_llama(30)).layers) == 33


@pytest.mark.parametrize(
    ("make", "match"),
    [
        pytest.param(lambda: ZeroDepth(every=2).plan(_llama(3)), "divisor of the 3", id="groups"),
        pytest.param(lambda: ZeroDepth(every=0), "every is 0", id="no group"),
        pytest.param(
            lambda: ZeroDepth(2, every=1), "beside factor or layers", id="every and factor"
        ),
        pytest.param(lambda: Overlap(2).plan(_llama(3)), "less than half of the 3", id="all drop"),
        pytest.param(lambda: Overlap(-1), "drop is -1", id="negative drop"),
        pytest.param(lambda: StackTop(0), "add is 0", id="none to add"),
        pytest.param(lambda: StackTop(4).plan(_llama(3)), "at most the 3 layers", id="more to add"),
        pytest.param(lambda: LinearExpand(0), "layers is 0", id="no layers"),
        pytest.param(lambda: LinearExpand().plan(_llama(1)), "at least 2", id="no line"),
        pytest.param(lambda: LinearExpand(of="pair").plan(_llama(3)), "exactly 2", id="no pair"),
        pytest.param(lambda: LinearExpand(of="x"), "'ends' or 'pair'", id="of what"),  # pyright: ignore
        pytest.param(lambda: RandomDepth(where="x"), "'top' or 'between'", id="where"),  # pyright: ignore
        pytest.param(lambda: AdvancedKnowledge(ffn=8).plan(_llama()), "would shrink", id="shrinks"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(("name", "operator"), OPERATORS.items(), ids=OPERATORS)
def test_plans_name_their_operator_and_options(name, operator):
    plan = operator().plan(_llama(4))
    assert (plan.operator, plan.options) == (name, dataclasses.asdict(operator()))
    assert plan.model_type == "llama"
    assert plan.preserves_function == (not plan.notes)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_operators_are_frozen_and_refuse_unknown_families(operator):
    first = dataclasses.fields(operator)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(operator(), first, 3)
    with pytest.raises(NotImplementedError, match="'mamba'"):
        operator().plan({"model_type": "mamba", "num_hidden_layers": 3})
