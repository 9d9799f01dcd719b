import dataclasses

import pytest

from apical.growth.operators import OPERATORS, Stack, Zero
from apical.growth.spaces import TABLES

_LLAMA = {"model_type": "llama", "num_hidden_layers": 3}


@pytest.mark.parametrize("factor", [2, 3, 4], ids=["default", "odd", "advised by the paper"])
@pytest.mark.parametrize("depth", [1, 3, 30], ids=["one layer", "odd", "real"])
def test_stack_repeats_the_block_sequence(factor, depth):
    plan = Stack(factor).plan(_LLAMA | {"num_hidden_layers": depth})
    assert [layer.terms for layer in plan.layers] == [
        ((new % depth, 1.0),) for new in range(factor * depth)
    ]
    assert not any(layer.zero for layer in plan.layers)
    assert not plan.preserves_function


@pytest.mark.parametrize("factor", [2, 3], ids=["default", "two copies"])
def test_zero_puts_silent_copies_behind_each_layer(factor):
    plan = Zero(factor).plan(_LLAMA)
    assert [layer.terms for layer in plan.layers] == [
        ((new // factor, 1.0),) for new in range(factor * 3)
    ]
    silent = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    assert [layer.zero for layer in plan.layers] == [
        silent if new % factor else () for new in range(factor * 3)
    ]
    assert plan.preserves_function


def test_zero_silences_biases_only_where_they_are():
    biased = Zero().plan(_LLAMA | {"attention_bias": True, "mlp_bias": True}).layers[1].zero
    assert {"self_attn.o_proj.bias", "mlp.down_proj.bias"} < set(biased)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("factor", [1, 0, -2, 2.0, "2", True, None], ids=lambda value: repr(value))
def test_factors_that_are_no_integer_of_at_least_2_are_refused(operator, factor):
    with pytest.raises(ValueError, match=r"^factor is .*expected an integer of at least 2$"):
        operator(factor)


@pytest.mark.parametrize(("name", "operator"), OPERATORS.items(), ids=OPERATORS)
def test_plans_name_their_operator_and_options(name, operator):
    for table in TABLES:
        config = _LLAMA | {"model_type": table.model_types[0]}
        plan = operator(3).plan(config)
        assert (plan.operator, plan.options) == (name, {"factor": 3})
        assert plan.model_type == config["model_type"]


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_operators_are_frozen_and_refuse_unknown_families(operator):
    with pytest.raises(dataclasses.FrozenInstanceError):
        operator().factor = 3
    with pytest.raises(NotImplementedError, match="'gpt2'"):
        operator().plan({"model_type": "gpt2", "n_layer": 3})
