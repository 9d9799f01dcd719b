"""Widening, over all families: the function is kept where the plan says so, and only there."""

from collections.abc import Callable

import pytest
import torch

from apical.growth.apply import grow
from apical.growth.operators import Widen
from apical.growth.spaces import architecture_of

_FEED_FORWARD = ("ffn", "moe_ffn", "shared_ffn")


def _ffn(table, old, times, **rest):
    there = [space for space in _FEED_FORWARD if space in table.spaces()]
    return Widen(**{space: int(old[space] * times) for space in there}, **rest)


# from the sizes of a family to an operator
_VARIANTS: dict[str, Callable] = {
    "all twice": lambda table, old: Widen(factor=2),
    "all by half, not whole copies": lambda table, old: Widen(factor=1.5),
    "all by half, zero": lambda table, old: Widen(factor=1.5, new="zero"),
    "uneven shares": lambda table, old: Widen(factor=2, split=0.3),
    "feed-forward": lambda table, old: _ffn(table, old, 1.5),
    "feed-forward, zero": lambda table, old: _ffn(table, old, 1.5, new="zero"),
    "heads": lambda table, old: Widen(heads=8),
    "heads, zero": lambda table, old: Widen(heads=8, new="zero"),
    "heads and their keys": lambda table, old: Widen(heads=8, kv_heads=8),
    "keys for every head": lambda table, old: Widen(kv_heads=4),
    "longer heads": lambda table, old: Widen(head_dim=2 * old["head_dim"]),
    "longer heads, zero": lambda table, old: Widen(head_dim=2 * old["head_dim"], new="zero"),
    "hidden by half": lambda table, old: Widen(hidden=48),
    "hidden twice": lambda table, old: Widen(hidden=64),
    "hidden by half, zero": lambda table, old: Widen(hidden=48, new="zero"),
    "every size at once": lambda table, old: Widen(
        hidden=96, heads=12, kv_heads=12, head_dim=96 // 12 * (old["head_dim"] // 8)
    ),
}
_STREAM_IS_NORMALISED = ("bert", "roberta", "electra", "modernbert", "opt-p")


def _operator(model, variant):
    config = model.config.to_dict()
    table = architecture_of(config)
    return _VARIANTS[variant](table, table.sizes(config))


def _should_be_kept(family, table, plan):
    """What the derivations say: RMS norms always, layer norms by whole copies or pre-norm zeros."""
    hidden = plan.spaces.get("hidden")
    if table.norm == "rms" or hidden is None or hidden.new % hidden.old == 0:
        zeros = hidden is not None and plan.options["new"] == "zero"
        if table.norm == "rms" or not zeros:
            return True
    return plan.options["new"] == "zero" and not family.startswith(_STREAM_IS_NORMALISED)


def _error(old, new):
    return float((new - old).abs().max() / old.abs().max())


def test_the_function_is_kept_exactly_where_the_plan_says_so(tiny, any_family, run, double):
    model = tiny(any_family, dtype=torch.float64)
    config, expected = model.config.to_dict(), run(model)
    for variant in _VARIANTS:
        operator = _operator(model, variant)
        plan = operator.plan(config)
        error = _error(expected, run(grow(model, operator)))
        should = _should_be_kept(any_family, architecture_of(config), plan)
        assert plan.preserves_function == should, variant
        if should:
            assert error <= 1e-10, variant
            assert not plan.notes, variant
        else:
            assert error > 1e-6, variant
            assert any("another mean and variance" in note for note in plan.notes), variant


def test_the_function_is_kept_in_float32(tiny, any_family, run):
    model = tiny(any_family)
    for variant in ("all twice", "all by half, zero", "longer heads"):
        operator = _operator(model, variant)
        if operator.plan(model.config.to_dict()).preserves_function:
            assert _error(run(model), run(grow(model, operator))) <= 1e-4, variant


@pytest.mark.parametrize("variant", ["all by half, not whole copies", "hidden by half"])
@pytest.mark.parametrize(
    "family",
    ["gpt2-tied", "gpt_neox", "opt-projected-post-norms", "bert-tied", "modernbert-tied", "vit"],
    ids=["pre-norms", "parallel branches", "post-norms", "encoder", "no biases", "images"],
)
def test_of_uneven_copies_mean_and_variance_alone_are_wrong(
    tiny, family, variant, run, double, monkeypatch
):
    model = tiny(family, dtype=torch.float64)
    operator = _operator(model, variant)
    grown = grow(model, operator)
    hidden = operator.plan(model.config.to_dict()).spaces["hidden"]
    wrong = _error(run(model), run(grown))
    # each old direction counts once in the statistics, however many copies it has
    counts = torch.bincount(hidden.carries.column).double()
    share = 1 / counts[hidden.carries.column] / hidden.old

    def by_old_directions(x, shape, weight, bias, eps):
        assert shape == (hidden.new,)
        centred = x - (x * share).sum(-1, keepdim=True)
        variance = (centred**2 * share).sum(-1, keepdim=True)
        result = centred / (variance + eps).sqrt() * weight
        return result if bias is None else result + bias

    expected = run(model)
    monkeypatch.setattr(torch.nn.functional, "layer_norm", by_old_directions)
    assert wrong > 1e-6
    assert _error(expected, run(grown)) <= 1e-10


def test_noise_on_copies_changes_the_function_a_little_and_the_plan_says_so(tiny, run):
    model = tiny("llama-tied", dtype=torch.float64)
    operator = Widen(ffn=96, noise=1e-4)
    plan = operator.plan(model.config.to_dict())
    assert not plan.preserves_function
    assert plan.notes == ("noise on what is read in copies",)
    assert 1e-7 < _error(run(model), run(grow(model, operator))) < 1e-2


@pytest.mark.parametrize("split", [0.0, 0.3], ids=["even", "uneven"])
def test_copies_are_read_with_their_shares(tiny, split):
    model = tiny("llama-every-bias")
    down = model.model.layers[0].mlp.down_proj.weight
    grown = grow(model, Widen(ffn=96, split=split)).model.layers[0].mlp.down_proj.weight
    share = (1 + split) / 2
    torch.testing.assert_close(grown[:, :48], down * share)
    torch.testing.assert_close(grown[:, 48:], down * (1 - share))


def test_new_directions_that_carry_nothing_are_read_at_random_by_the_seed(tiny):
    model = tiny("llama-every-bias")
    old = model.model.layers[0].mlp
    draws = [grow(model, Widen(ffn=96, new="zero", seed=s)).model.layers[0].mlp for s in (1, 1, 2)]
    for mlp in draws:
        assert torch.equal(mlp.up_proj.weight[:48], old.up_proj.weight)
        assert mlp.up_proj.weight[48:].abs().max() == mlp.up_proj.bias[48:].abs().max() == 0
        assert torch.equal(mlp.down_proj.weight[:, :48], old.down_proj.weight)
        # 32 x 48 draws: their deviation is that of the weight, to a few of 1 / sqrt(2 * 1536)
        ratio = mlp.down_proj.weight[:, 48:].std() / old.down_proj.weight.std()
        assert 0.9 < ratio < 1.1
    same, again, other = (mlp.down_proj.weight[:, 48:] for mlp in draws)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_a_stream_that_feeds_a_tied_head_without_a_norm_cannot_widen(tiny, run, double):
    model = tiny("opt-post-norms-untied", dtype=torch.float64)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    plan = Widen(hidden=64).plan(model.config.to_dict())
    assert not plan.preserves_function
    assert "no norm before the tied head" in plan.notes[0]
    assert _error(run(model), run(grow(model, Widen(hidden=64)))) > 1e-6


@pytest.mark.parametrize(
    ("family", "operator", "match"),
    [
        pytest.param("llama-tied", Widen(hidden=16), "hidden would shrink from 32", id="smaller"),
        pytest.param("llama-tied", Widen(factor=1.3), "makes hidden 41.6", id="no integer"),
        pytest.param("llama-tied", Widen(heads=9), "9 heads cannot share 2", id="no groups"),
        pytest.param("gpt2-tied", Widen(heads=6, hidden=40), "make 48, not", id="heads in hidden"),
        pytest.param("qwen2-moe", Widen(ffn=80), "no ffn to widen; it has moe_ffn", id="experts"),
        pytest.param("llama-tied", Widen(moe_ffn=80), "it has ffn", id="no experts"),
    ],
)
def test_sizes_that_a_model_cannot_have_are_refused(tiny, family, operator, match):
    with pytest.raises(ValueError, match=match):
        operator.plan(tiny(family).config.to_dict())


def test_what_an_operator_leaves_out_keeps_its_size(tiny):
    grown = grow(tiny("llama-tied"), Widen(ffn=96)).config
    assert (grown.hidden_size, grown.intermediate_size) == (32, 96)
    assert (grown.num_attention_heads, grown.num_key_value_heads, grown.head_dim) == (4, 2, 8)
