import gc
import json
import weakref
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from apical.growth.apply import grow
from apical.growth.learned import fit_growth
from apical.growth.learned.fit import _Grown, _Old
from apical.growth.learned.parameters import Learnable, settled
from apical.growth.learned.start import start_plan
from apical.growth.operators import RandomDepth, Stack, Widen
from apical.growth.operators.learned import Learned
from apical.growth.plan import GrowthPlan, LayerSource
from apical.growth.shards import grow_checkpoint

_VOCAB = 16
_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": _VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_GPT2 = {"model_type": "gpt2", "vocab_size": _VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4}
_GPT2 |= {"n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"} | {"model_type": "bert"}
_FAMILIES = {
    "llama, grouped queries": _LLAMA,
    "llama, tied": _LLAMA | {"tie_word_embeddings": True},
    "gpt2, layer norms, tied, transposed and joint weights": _GPT2,
    "bert, norms of the stream, masked tokens": _BERT,
    "gemma3, offset of gains, scaled embeddings": _LLAMA
    | {"model_type": "gemma3_text", "head_dim": 4},
    "mixtral, experts stacked in memory": _LLAMA
    | {"model_type": "mixtral", "num_local_experts": 3},
    "olmo2, norms of all heads": _LLAMA | {"model_type": "olmo2"},
}
_BOTH = [Stack(2), Widen(factor=2)]
_UNEVEN = [Widen(hidden=24, ffn=40, heads=6, kv_heads=3)]


def _model(config, dtype=torch.float64):
    kind = AutoModelForMaskedLM if config["model_type"] == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    made = AutoConfig.for_model(**config)
    # the grouped products of experts have no float64
    made._experts_implementation = "eager" if dtype == torch.float64 else None
    model = kind.from_config(made, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def _batches(model, count, rows=4, seed=0):
    made = []
    for at in range(count):
        tokens = _chain(rows, 16, seed * 1000 + at)
        labels = tokens.clone()
        if model.config.model_type == "bert":
            hidden = torch.arange(16) % 3 == at % 3  # the label is what stood at a masked place
            labels[:, ~hidden], tokens[:, hidden] = -100, 0
        made.append({"input_ids": tokens, "labels": labels})
    return made


def _chain(rows, length, seed):
    """Tokens of a Markov chain whose next token depends on the last two."""
    next_token = torch.randn(_VOCAB, _VOCAB, _VOCAB, generator=torch.Generator().manual_seed(1))
    chances, generator = (3 * next_token).softmax(-1), torch.Generator().manual_seed(seed)
    tokens = torch.randint(_VOCAB, (rows, 2), generator=generator)
    for _ in range(length - 2):
        drawn = torch.multinomial(chances[tokens[:, -2], tokens[:, -1]], 1, generator=generator)
        tokens = torch.cat([tokens, drawn], 1)
    return tokens


def _learnable(model, start, noise):
    old = _Old.of(model)
    plan = start_plan(start, old.config)
    found = Learnable(plan, old.naming.table, old.places, noise=noise, seed=0)
    return found, _Grown(old, plan)


class _Start:
    def __init__(self, operators):
        self.operators = operators

    def plan(self, config):
        return start_plan(self.operators, config)


@pytest.fixture(params=_FAMILIES)
def model(request):
    return _model(_FAMILIES[request.param])


def _sizes_of(model):
    if model.config.model_type in ("gpt2", "bert"):
        return [Widen(hidden=24, ffn=80, heads=6)]  # no head of its own size, no groups
    return _UNEVEN


@pytest.mark.parametrize("even", [True, False], ids=["deeper, every size twice", "uneven copies"])
def test_without_changes_the_weights_are_those_of_the_start(model, even):
    start = _BOTH if even else _sizes_of(model)
    learnable, grown = _learnable(model, start, noise=0.0)
    expected = dict(grow(model, _Start(start)).named_parameters())
    with torch.no_grad():
        found = grown.weights(learnable.plan())
    assert set(found) == set(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name].detach(), rtol=1e-12, atol=1e-14, msg=name
        )


def test_the_plan_makes_the_weights_and_the_loss_of_the_fit(model):
    learnable, grown = _learnable(model, _BOTH, noise=0.5)
    for matrix in learnable.depths.values():
        matrix.data.normal_()  # every new layer is made of all old ones, by name
    batch = _batches(model, 1)[0]
    with torch.no_grad():
        weights, loss = grown.weights(learnable.plan()), grown.loss(learnable.plan(), batch)
    big = grow(model, Learned(settled(learnable)))
    for name, parameter in big.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), weights[name], rtol=1e-12, atol=1e-13, msg=name
        )
    torch.testing.assert_close(big(**batch).loss.detach(), loss, rtol=1e-6, atol=0.0)  # a float32


def test_gradients_are_those_of_differences(model):
    learnable, grown = _learnable(model, _BOTH, noise=0.1)
    for named in (learnable.changes, learnable.depths):
        for name in named:
            named[name] = named[name].detach().double().requires_grad_()

    def total():  # of every weight, each with a factor of its own; squares, so that it curves
        weights = grown.weights(learnable.plan()).values()
        return torch.stack(
            [(w**2 * torch.arange(w.numel()).view_as(w).cos()).sum() for w in weights]
        ).sum()

    gradients = torch.autograd.grad(total(), learnable.parameters())
    at, step = (0, -1), 1e-5  # row 0 is a first copy, the last column another direction
    with torch.no_grad():
        for parameter, gradient in zip(learnable.parameters(), gradients, strict=True):
            parameter[at] += step
            above = total()
            parameter[at] -= 2 * step
            slope = (above - total()) / (2 * step)
            parameter[at] += step
            torch.testing.assert_close(gradient[at], slope, rtol=1e-6, atol=1e-6)


def test_fitting_lowers_the_loss_of_every_family_and_leaves_the_model(model):
    model = model.float().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = _batches(model, 1, rows=64, seed=9)[0]
    plan = fit_growth(model, _BOTH, _batches(model, 30), steps=30)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        start, fitted = (grow(model, op)(**held).loss for op in (_Start(_BOTH), Learned(plan)))
    assert fitted < start - 0.02  # the weights are random: not much can be learned of them


def _trained(model, steps, lr, seed):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step, batch in enumerate(_batches(model, steps, rows=16, seed=seed)):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model


def test_a_trained_model_grows_better_than_by_copies_and_stays_ahead():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
    }  # enough to learn the chain with
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(_LLAMA | sizes)))
    _trained(model, 300, 5e-3, seed=1)
    held = _batches(model, 1, rows=128, seed=9)[0]

    def loss(model):
        with torch.no_grad():
            return model(**held).loss.item()

    plan = fit_growth(model, _BOTH, _batches(model, 60, rows=16, seed=2), steps=60)
    start, fitted = grow(model, _Start(_BOTH)), grow(model, Learned(plan))
    assert loss(fitted) < loss(start) - 0.1
    assert loss(fitted) < loss(model)
    for big in (start, fitted):
        _trained(big, 60, 2e-3, seed=3)
    assert loss(fitted) < loss(start)


def test_the_seed_decides_and_numbers_of_the_caller_are_left_alone():
    model = _model(_LLAMA, torch.float32)
    batches = _batches(model, 3)
    torch.manual_seed(5)
    drawn = torch.get_rng_state()
    first, again, other = (
        fit_growth(model, _BOTH, batches, steps=3, seed=seed).to_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), drawn)
    assert first == again
    assert first["spaces"] != other["spaces"]


def test_only_the_plan_stays_in_memory():
    model = _model(_LLAMA, torch.float32)
    batches = _batches(model, 2)
    gc.collect()
    before = {id(found) for found in gc.get_objects() if issubclass(type(found), torch.Tensor)}
    plan = fit_growth(model, _BOTH, batches, steps=2)
    gone = weakref.ref(plan)
    del plan
    gc.collect()
    left = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    assert gone() is None
    assert [found.shape for found in left if id(found) not in before] == []


def test_a_plan_survives_json_and_prints():
    model = _model(_LLAMA, torch.float32)
    plan = fit_growth(model, _BOTH, _batches(model, 2), steps=2)
    again = GrowthPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert "loss" in plan.notes[0]
    assert "hidden  16 -> 32" in str(plan)
    assert not plan.preserves_function


def test_a_checkpoint_grows_to_what_the_model_does(tmp_path):
    model = _model(_LLAMA | {"tie_word_embeddings": True}, torch.float32)
    plan = fit_growth(model, _BOTH, _batches(model, 2), steps=2)
    model.save_pretrained(tmp_path / "old")
    grow_checkpoint(tmp_path / "old", tmp_path / "new", Learned(plan))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    expected = grow(model, Learned(plan)).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_depth_alone_and_width_alone_change_only_themselves():
    model = _model(_LLAMA, torch.float32)
    deep = fit_growth(model, Stack(2), _batches(model, 2), steps=2)
    assert not deep.spaces
    assert set(deep.layers[0].own) == {
        name.removeprefix("model.layers.0.")
        for name, _ in model.named_parameters()
        if name.startswith("model.layers.0.")
    }
    wide = fit_growth(model, Widen(ffn=48), _batches(model, 2), steps=2)
    assert set(wide.spaces) == {"ffn"}
    assert wide.layers == tuple(LayerSource(((i, 1.0),)) for i in range(2))


def test_a_head_of_another_size_keeps_its_rotary_dimensions():
    model = _model(_LLAMA | {"head_dim": 4}, torch.float32)
    plan = fit_growth(model, Widen(head_dim=8, heads=8, kv_heads=4), _batches(model, 2), steps=2)
    assert plan.spaces["qk_dim"] == Widen(head_dim=8).plan(model.config.to_dict()).spaces["qk_dim"]
    assert not plan.spaces["heads"].carries.selects


_REFUSED = {
    "no steps": ({"steps": 0}, "^steps=0.*expected steps of at least 1"),
    "no rate": ({"lr": 0.0}, "lr=0.0.*lr above 0"),
    "noise below 0": ({"noise": -1.0}, "noise of at least 0$"),
    "no operator": ({"start": []}, "^start is empty"),
    "two depths": (
        {"start": [Stack(2), Stack(2)]},
        "^start changes the depth with stack and stack",
    ),
    "a space twice": ({"start": [Widen(ffn=32), Widen(ffn=48)]}, "^start maps ffn twice"),
    "empty directions": ({"start": Widen(ffn=48, new="zero")}, "^start makes ffn of other things"),
    "random layers": ({"start": RandomDepth(2)}, "^start makes layers of random numbers"),
    "nothing to learn": ({"start": Widen(factor=1)}, "^start changes nothing"),
    "no batches": ({"batches": []}, "^batches is empty"),
    "no labels": ({"batches": [{"input_ids": torch.zeros(1, 4).long()}]}, "gives no loss"),
}


@pytest.mark.parametrize(("change", "message"), _REFUSED.values(), ids=_REFUSED)
def test_what_cannot_be_fitted_is_refused(change, message):
    model = _model(_LLAMA, torch.float32)
    options = {"start": Stack(2), "batches": _batches(model, 1), "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        fit_growth(model, options.pop("start"), options.pop("batches"), **options)


def test_a_loss_that_is_not_finite_is_an_error():
    model = _model(_LLAMA, torch.float32)
    model.model.norm.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"^the loss is nan at step 0; choose lr below 0\.03$"):
        fit_growth(model, Stack(2), _batches(model, 1), steps=1)


def test_a_plan_for_other_sizes_is_refused():
    plan = fit_growth(_model(_LLAMA), Widen(ffn=48), _batches(_model(_LLAMA), 1), steps=1)
    other = _model(_LLAMA | {"intermediate_size": 32})
    with pytest.raises(ValueError, match=r"^fitted is a plan for a llama with 2 layers and .*24"):
        grow(other, Learned(plan))
