"""Models and state dicts in memory."""

import copy

import pytest
import torch
from torch import nn

import apical

_TABLE = {"llama-tied", "qwen2-biases-tied", "olmo2-post-norms"}


@pytest.fixture(params=sorted(_TABLE))
def models(tiny, request):
    return [tiny(request.param) for _ in range(3)]


def _mean(models, name):
    return torch.stack([model.state_dict()[name].double() for model in models]).mean(0)


def test_a_merged_model_is_new_and_computes_with_the_mean(models, tokens):
    models[0].train()
    models[0].get_input_embeddings().weight.requires_grad_(False)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    merged = apical.merge(models, apical.Average())
    assert type(merged) is type(models[0])
    assert merged.training
    flags = {name: p.requires_grad for name, p in models[0].named_parameters()}
    assert {name: p.requires_grad for name, p in merged.named_parameters()} == flags
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight.double(), _mean(models, name), rtol=1e-6, atol=1e-6)
    # by another way: a stock model with the mean as its weights
    stock = copy.deepcopy(models[1])
    stock.load_state_dict({name: _mean(models, name).float() for name in before[0]})
    with torch.no_grad():
        expected = stock.eval()(tokens).logits
        torch.testing.assert_close(merged.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    old = {p.data_ptr() for model in models for p in model.parameters()}
    assert not old & {p.data_ptr() for p in merged.parameters()}
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(model.state_dict()[name], t) for name, t in state.items())


def test_tied_weights_stay_tied(tiny):
    merged = apical.merge([tiny("llama-tied"), tiny("llama-tied")], apical.EMA(0.5))
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


def test_one_model_is_itself(models):
    merged = apical.merge(models[:1], apical.Average())
    state = models[0].state_dict()
    assert all(torch.equal(state[name], t) for name, t in merged.state_dict().items())


def test_models_with_kernels_merge_and_keep_them(tiny, tokens):
    plain = [tiny("llama-tied") for _ in range(2)]
    fast = [apical.use_kernels(copy.deepcopy(model)) for model in plain]
    expected, merged = (apical.merge(some, apical.Average()) for some in (plain, fast))
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, expected(tokens).logits)
        # the old one is not what the new one runs
        assert not torch.equal(merged(tokens).logits, fast[0](tokens).logits)


def test_a_forgotten_task_is_the_base_less_its_vector(models):
    base, task = models[:2]
    merged = apical.merge([base, task], apical.TaskVectors(-0.5)).state_dict()
    for name, weight in base.state_dict().items():
        expected = weight.double() - 0.5 * (task.state_dict()[name].double() - weight.double())
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_soup_is_given_models(tiny, tokens):
    models = [tiny("llama-tied") for _ in range(3)]

    @torch.no_grad()
    def score(model):
        assert type(model) is type(models[0])
        return -model(input_ids=tokens, labels=tokens).loss.item()

    best = max(models, key=score)
    assert score(apical.merge(models, apical.GreedySoup(score))) >= score(best)


def test_modules_of_your_own_and_their_buffers():
    one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        other.weight.fill_(3)
    merged = apical.merge([one, other], apical.Average())
    assert merged.weight.tolist() == [2, 2, 2]
    other.get_buffer("running_mean").fill_(1)
    with pytest.raises(
        ValueError, match=r"running_mean is a buffer and not the same in models\[1\]"
    ):
        apical.merge([one, other], apical.Average())


def test_state_dicts():
    one = {"w": torch.tensor([1.0, 2.0]).bfloat16(), "ids": torch.tensor([4, 5])}
    other = {"w": torch.tensor([3.0, 6.0]), "ids": torch.tensor([4, 5])}
    merged = apical.merge([one, other], apical.Average())
    assert merged.keys() == one.keys()
    assert merged["w"].dtype == torch.bfloat16
    assert merged["w"].tolist() == [2, 4]
    assert merged["ids"].tolist() == [4, 5]
    assert merged["ids"].data_ptr() != one["ids"].data_ptr()


_W = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("models", "match"),
    [
        ([], "models is empty; expected one model or more"),
        ([_W], r"models\[0\] is a Tensor; expected a model or state dict"),
        ([{"w": _W}, nn.Linear(3, 2)], r"models\[1\] is a Linear and models\[0\] a dict"),
        ([nn.Linear(3, 2), nn.LayerNorm(3)], "a LayerNorm and models.* a Linear; expected one"),
        ([{"w": _W}, {}], r"w is in models\[0\] and not in models\[1\] \(1 tensors differ\)"),
        ([{}, {"w": _W}], r"w is in models\[1\] and not in models\[0\]"),
        ([{"w": _W}, {"w": _W.T}], r"w has shape \(2, 3\) in models\[0\] and \(3, 2\)"),
        ([{"w": _W.int()}, {"w": 2 * _W.int()}], "w holds torch.int32 .* expected equal ones"),
        ([{"w": _W.int()}, {"w": _W}], r"w holds torch.int32 .* \(torch.float32\)"),
        ([nn.Linear(3, 2), nn.Linear(3, 2, bias=False)], r"bias is in models\[0\] and not in"),
        ([{"w": _W}] * 2, "weights has 1 numbers; expected 2"),
    ],
)
def test_models_that_do_not_go_together(models, match):
    with pytest.raises(ValueError, match=match) as caught:
        apical.merge(models, apical.Linear([1.0]))
    assert "\n" not in str(caught.value)


def test_configs_that_compute_something_else(tiny):
    one, other = tiny("llama-tied"), tiny("llama-tied")
    other.config.rms_norm_eps = 0.5
    other.config.use_cache = False  # changes nothing that is computed
    with pytest.raises(
        ValueError, match=r"rms_norm_eps is 0.5 in the config of models\[1\] and 1e-"
    ):
        apical.merge([one, other], apical.Average())
    other.config.rms_norm_eps = one.config.rms_norm_eps
    apical.merge([one, other], apical.Average())


def test_sparse_models_are_exported_first(tiny):
    models = [apical.sparsify(tiny("llama-tied"), apical.LowRank(rank=2)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"models\[0\] has sparse layers, .* export it first"):
        apical.merge(models, apical.Average())
