"""Plans after each other and plans back, held against what growing models really does."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import apical
from apical.growth.apply import grow
from apical.growth.operators import (
    AdvancedKnowledge,
    Decoalesce,
    Interleave,
    LinearExpand,
    Overlap,
    RandomDepth,
    Stack,
    StackTop,
    Widen,
    ZeroDepth,
)
from apical.growth.plan import Fill, GrowthPlan, LayerSource
from apical.growth.spaces import architecture_of


def _plan(operator, model):
    return operator.plan(model.config.to_dict())


def _error(one, other):
    """The largest difference of weights, relative to the largest weight of each tensor."""
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return max(
        float((one[name] - other[name]).abs().max() / other[name].abs().max().clamp(min=1e-3))
        for name in one
    )


def _fits(operator, family):
    return not isinstance(operator, ZeroDepth) or not family.startswith(
        ("bert", "roberta", "electra", "opt-p")
    )


_PAIRS = {
    "depth, then width": (Stack(2), Widen(factor=2)),
    "width, then depth": (Widen(factor=2), Interleave(2)),
    "zeros, then width": (ZeroDepth(2), Widen(factor=2)),
    "zeros, then more layers": (ZeroDepth(2), Stack(2)),
    "sums, then copies": (LinearExpand(4), Overlap(1)),
    "copies, then sums": (Overlap(0), LinearExpand(3)),
    "width twice, whole copies": (Widen(factor=2), Widen(factor=2)),
    "width by half, then whole copies": (Widen(factor=1.5), Widen(factor=2)),
    "uneven shares, then depth": (Widen(factor=2, split=0.5), StackTop(1)),
    "copies, then random reads": (Stack(2), Widen(factor=1.5, new="zero")),
    "ahead, then depth": (AdvancedKnowledge(factor=2), Stack(2)),
    "copies, then random layers": (Widen(factor=2), RandomDepth(2)),
    "a level up, then a level up": (Decoalesce(2), Decoalesce(2)),
}


@pytest.mark.parametrize("pair", _PAIRS)
def test_a_composed_plan_is_both_plans_after_each_other(tiny, any_family, pair):
    first, second = _PAIRS[pair]
    if not _fits(first, any_family):
        pytest.skip("no layer of the family can add nothing")
    model = tiny(any_family, dtype=torch.float64)
    middle = grow(model, first)
    plan = _plan(first, model).compose(_plan(second, middle))
    once, twice = grow(model, plan), grow(middle, second)
    assert once.config.to_dict() == twice.config.to_dict()
    assert _error(once, twice) <= 1e-12
    assert GrowthPlan.from_yaml(plan.to_yaml()) == plan


_REFUSED = {
    "uneven copies grow again": (Widen(factor=2), Widen(factor=1.5), "has copies of another"),
    "random reads come first": (Widen(factor=1.5, new="zero"), Stack(2), "draws random weights"),
    "random layers come first": (RandomDepth(2), Stack(2), "draws random weights"),
    "noise comes first": (Widen(factor=2, noise=0.1), Stack(2), "draws random weights"),
    "noise on copies of copies": (Widen(factor=2), Widen(factor=2, noise=0.1), "adds noise"),
    "ahead in another depth": (Stack(2), AdvancedKnowledge(factor=2), "depends on the order"),
    "wider than what is ahead": (AdvancedKnowledge(factor=2), Widen(factor=2), "on the order"),
    "sums of zeros": (ZeroDepth(2), LinearExpand(4), "zero in some alone"),
}


@pytest.mark.parametrize("pair", _REFUSED)
def test_what_one_plan_cannot_say_is_refused_with_what_to_do(tiny, pair):
    first, second, match = _REFUSED[pair]
    model = tiny("llama-tied")
    with pytest.raises(ValueError, match=f"{match}.*; apply one plan after the other$"):
        _plan(first, model).compose(_plan(second, grow(model, first)))


@pytest.mark.parametrize(
    ("second", "match"),
    [
        pytest.param(Stack(2), "for 12 layers; expected 6 at most", id="another depth"),
        pytest.param(Widen(hidden=256), "for hidden 128; expected 64", id="another width"),
        pytest.param("olmo2-post-norms", "for a olmo2; expected a llama", id="another family"),
    ],
)
def test_plans_of_other_models_do_not_compose(tiny, second, match):
    model = tiny("llama-tied")
    both = Decoalesce(2).plan(model.config.to_dict())
    if isinstance(second, str):
        following = _plan(Stack(2), tiny(second))
    else:
        level = Decoalesce(2, width=1) if isinstance(second, Stack) else Widen(factor=2)
        following = _plan(second, grow(grow(model, both), level))
    with pytest.raises(ValueError, match=match):
        both.compose(following)


_BACK = {
    "stack": Stack(2),
    "partial stack": Stack(layers=4),
    "interleave": Interleave(3),
    "zeros": ZeroDepth(2),
    "random layers": RandomDepth(2),
    "overlap": Overlap(0),
    "top": StackTop(2),
    "width twice": Widen(factor=2),
    "width by half": Widen(factor=1.5),
    "width by zeros": Widen(factor=1.5, new="zero"),
    "uneven shares": Widen(factor=2, split=0.5),
    "longer heads": None,
    "a level": Decoalesce(2),
}


@pytest.mark.parametrize("operator", _BACK.values(), ids=_BACK)
def test_the_inverse_gives_old_weights_back(tiny, any_family, operator):
    if not _fits(operator, any_family):
        pytest.skip("no layer of the family can add nothing")
    model = tiny(any_family, dtype=torch.float64)
    if any_family == "modernbert-tied" and operator is _BACK["width by zeros"]:
        pytest.skip("its first norm writes what the next one divides by: the width is not exact")
    if operator is None:
        sizes = architecture_of(model.config.to_dict()).sizes(model.config.to_dict())
        operator = Widen(head_dim=2 * sizes["head_dim"])
    plan = _plan(operator, model)
    back = grow(grow(model, plan), plan.inverse())
    old, new = model.config.to_dict(), back.config.to_dict()
    table = architecture_of(old)
    assert table.sizes(new) == table.sizes(old)
    assert new[table.depth_key] == old[table.depth_key]
    assert _error(back, model) <= 1e-12


def test_trained_copies_come_back_as_their_average(tiny):
    model = tiny("llama-tied", dtype=torch.float64)
    plan = _plan(Stack(2), model)
    grown = grow(model, plan)
    with torch.no_grad():
        grown.model.layers[4].mlp.up_proj.weight.add_(1)  # the second copy of layer 1
    back = grow(grown, plan.inverse())
    expected = model.model.layers[1].mlp.up_proj.weight + 0.5
    torch.testing.assert_close(back.model.layers[1].mlp.up_proj.weight, expected)


@pytest.mark.parametrize(
    ("operator", "match"),
    [
        pytest.param(AdvancedKnowledge(factor=2), "mixes layers in their width", id="ahead"),
        pytest.param(Widen(factor=2, noise=0.1), "adds noise", id="noise"),
        pytest.param(LinearExpand(4), "no whole copy of layer 1", id="a layer that is not used"),
    ],
)
def test_what_is_lost_has_no_inverse(tiny, operator, match):
    with pytest.raises(ValueError, match=match):
        _plan(operator, tiny("llama-tied")).inverse()


def test_a_layer_that_is_silent_everywhere_is_lost():
    silent = LayerSource(((1, 1.0),), ("mlp.down_proj.weight",))
    plan = GrowthPlan("mix", {}, "llama", (LayerSource(((0, 1.0),)), silent))
    with pytest.raises(ValueError, match="no whole copy of layer 1"):
        plan.inverse()


def test_keys_of_a_config_have_no_inverse():
    plan = GrowthPlan("mix", {}, "llama", (LayerSource(((0, 1.0),)),), config={"rope_theta": 2.0})
    with pytest.raises(ValueError, match="'rope_theta'"):
        plan.inverse()


_MIXES = st.lists(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([1.0, 0.5, -2.0])), min_size=1, max_size=3
    ),
    min_size=3,
    max_size=5,
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=_MIXES, second=_MIXES)
def test_depth_maps_compose_as_matrices(first, second):
    def plan(rows):
        layers = tuple(LayerSource(tuple(dict(row).items())) for row in rows)
        return GrowthPlan("mix", {}, "llama", layers)

    def matrix(plan, old):
        full = torch.zeros(len(plan.layers), old, dtype=torch.float64)
        for new, layer in enumerate(plan.layers):
            for at, weight in layer.terms:
                full[new, at] += weight
        return full

    one, other = plan(first), plan(second)
    product = matrix(other, len(one.layers)) @ matrix(one, 3)
    torch.testing.assert_close(matrix(one.compose(other), 3), product)


def test_own_terms_and_zeros_compose():
    up, down = "mlp.up_proj.weight", "mlp.down_proj.weight"
    mixed = LayerSource(((0, 1.0),), (down,), {up: ((0, 0.5), (1, 0.5))})
    one = GrowthPlan("a", {}, "llama", (mixed, LayerSource(((1, 1.0),))))
    other = GrowthPlan(
        "b", {}, "llama", (LayerSource(((0, 2.0),)), LayerSource(((1, 1.0),), (up,)))
    )
    found = one.compose(other)
    assert found.layers[0] == LayerSource(((0, 2.0),), (down,), {up: ((0, 1.0), (1, 1.0))})
    assert found.layers[1] == LayerSource(((1, 1.0),), (up,))


def test_options_and_notes_of_both_are_kept(tiny):
    model = tiny("llama-tied")
    found = _plan(Stack(2), model).compose(_plan(Interleave(3), grow(model, Stack(2))))
    assert found.operator == "stack, interleave"
    assert found.options == {"factor": 2, "then_factor": 3}
    assert len(found.notes) == 2


@pytest.mark.parametrize("width", [None, Widen(factor=2)], ids=["depth alone", "width as well"])
def test_a_composed_plan_preserves_what_both_preserve(tiny, tokens, width):
    model = tiny("llama-tied", dtype=torch.float64)
    middle = grow(model, ZeroDepth(2))
    plan = _plan(ZeroDepth(2), model).compose(_plan(width or ZeroDepth(2), middle))
    assert plan.preserves_function
    with torch.no_grad():
        old, new = model(tokens).logits, grow(model, plan)(tokens).logits
    assert float((new - old).abs().max() / old.abs().max()) <= 1e-10


def test_differences_name_each_place(tiny):
    model = tiny("llama-tied")
    plan = _plan(Stack(layers=4), model)
    assert plan.diff(plan) == ""
    assert plan.diff(_plan(StackTop(1), model)).splitlines() == [
        "operator: stack -> stack-top",
        "options: {'factor': None, 'layers': 4} -> {'add': 1}",
        "notes: blocks that follow each other were not trained to -> the last layers run twice",
        "layer 3: 0 -> 2",
    ]
    wide, ahead = Widen(ffn=96), AdvancedKnowledge(ffn=96)
    lines = _plan(wide, model).diff(_plan(ahead, model)).splitlines()
    assert lines[-1] == (
        "ffn: 96 of 48 (2 copies, read × 0.5) -> "
        "96 of 48 (2 copies, read × 0.5, 48 from the next layer)"
    )
    assert "ffn: as it is -> 96 of 48 (2 copies, read × 0.5)" in plan.diff(_plan(wide, model))


def test_a_plan_is_refused_by_a_model_that_it_is_not_for(tiny):
    model = tiny("llama-tied")
    plan = _plan(Decoalesce(2), model)
    with pytest.raises(ValueError, match="the plan is for a llama, the model is a olmo2"):
        grow(tiny("olmo2-post-norms"), plan)
    with pytest.raises(ValueError, match="the plan is for hidden 32, the model has 64"):
        grow(grow(model, plan), plan)
    shallow = _plan(Stack(2), grow(model, Stack(2)))
    with pytest.raises(ValueError, match="for 6 layers or more, the model has 3"):
        grow(model, shallow)


def test_a_plan_is_made_from_models_configs_and_directories(tiny, tmp_path):
    model = tiny("llama-tied")
    model.save_pretrained(tmp_path / "small")
    expected = _plan(Widen(factor=2), model)
    config = model.config.to_diff_dict() | {"model_type": "llama"}
    for source in (model, model.config, config, tmp_path / "small", str(tmp_path / "small")):
        assert apical.plan(source, Widen(factor=2)) == expected


def test_random_seeds_of_the_second_plan_are_kept(tiny):
    model = tiny("llama-tied")
    found = _plan(Stack(2), model).compose(_plan(RandomDepth(2, seed=7), grow(model, Stack(2))))
    assert found.fill == Fill(seed=7)
