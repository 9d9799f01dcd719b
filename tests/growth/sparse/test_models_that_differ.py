"""Models that compute with the weights of their layers by themselves, or keep them in stacks."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import apical
from apical import (
    Block,
    LowRank,
    LowRankLinear,
    Masked,
    Monarch,
    SparseLowRank,
    SparseLowRankLinear,
    sparsify,
)
from apical.growth.sparse import Rule, StructuredLinear, replaced
from apical.growth.sparse.layers import _weight

TOKENS = torch.arange(2 * 12).mul(7).remainder(64).view(2, 12)  # (B, S)


def t5(**options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
    config = T5Config(**sizes, num_heads=4, dropout_rate=0.0, **options)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def mamba() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=8
    )
    return MambaForCausalLM(config)


def bloom() -> PreTrainedModel:
    torch.manual_seed(0)
    # the sum in slices, which is off by default
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    config.pretraining_tp, config.slow_but_exact = 2, True
    return BloomForCausalLM(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": t5,  # the type of wo
    "t5-gated": lambda: t5(feed_forward_proj="gated-gelu"),
    "mamba": mamba,  # a product with dt_proj
    "bloom": bloom,  # products with columns of dense
}
FULL: dict[str, Rule] = {
    "sparse-low-rank": SparseLowRank(rank=1.0, density=0.1),
    "low-rank": LowRank(rank=1.0),
    "monarch": Monarch(blocks=1),
    "block": Block(blocks=1),
}


def loss_and_gradients(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.train().zero_grad()
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    _weight._say.cache_clear()
    caplog.set_level(logging.WARNING, logger="apical")
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("apical")]


@pytest.mark.parametrize("rule", FULL.values(), ids=FULL)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_reads_weights_computes_and_learns_the_same(name: str, rule: Rule):
    before, wanted = loss_and_gradients(MODELS[name]())
    model = sparsify(MODELS[name](), rule)
    after, got = loss_and_gradients(model)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    layers = replaced(model)
    learning = {name for name, gradient in got.items() if gradient is not None}
    # in slices, Bloom leaves out a bias
    assert {n for n in got if n.rpartition(".")[0] in layers and "bias" not in n} <= learning
    # what lies before the replaced layers has the same gradient
    for other, gradient in got.items():
        if other.rpartition(".")[0] not in layers:
            torch.testing.assert_close(gradient, wanted[other], rtol=1e-3, atol=1e-5)


def test_a_type_that_is_asked_for_costs_nothing(monkeypatch, warnings):
    def dense_weight(layer: StructuredLinear) -> Tensor:
        raise AssertionError(layer.path)

    monkeypatch.setattr(LowRankLinear, "dense_weight", dense_weight)
    model = sparsify(t5(), LowRank(activation="silu", init="cola"))
    assert "decoder.block.1.layer.2.DenseReluDense.wo" in replaced(model)
    assert loss_and_gradients(model)[0].isfinite()
    assert warnings() == []


def test_t5_keeps_wo_in_float32(tmp_path):
    # transformers does so by the name of the layer, and T5 asks for the type to follow
    sparsify(t5(), LowRank(rank=4)).save_pretrained(tmp_path)
    model = apical.load(tmp_path, dtype=torch.float16)
    layer = model.decoder.block[0].layer[2].DenseReluDense.wo
    assert (layer.a.dtype, layer.weight.dtype) == (torch.float32, torch.float32)
    assert model.shared.weight.dtype == torch.float16
    assert model(input_ids=TOKENS, labels=TOKENS).loss.isfinite()


def test_that_a_weight_is_made_dense_is_said_once(warnings):
    model = sparsify(mamba(), LowRank(rank=4))
    for _ in range(2):
        loss_and_gradients(model)
    (message,) = warnings()
    assert "exclude=('backbone.layers.*.mixer.dt_proj',) in the rule" in message


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(Masked(sparsity=0.5), id="its gradient would not be masked"),
        pytest.param(LowRank(rank=4, activation="silu", init="cola"), id="it is no matrix"),
    ],
)
def test_layers_that_no_dense_weight_stands_for_are_refused(rule: Rule):
    model = mamba()
    with pytest.raises(ValueError, match=r"weight that MambaMixer computes with by itself") as no:
        sparsify(model, rule)
    assert "backbone.layers.0.mixer.x_proj has a weight" in str(no.value)
    assert str(no.value).endswith("pass exclude=('backbone.layers.*.mixer.x_proj',)")
    assert not replaced(model)
    rest = (f"backbone.layers.*.mixer.{name}_proj" for name in ("x", "dt", "out"))
    sparsify(model, replace(rule, exclude=tuple(rest)))
    assert loss_and_gradients(model)[0].isfinite()


def test_a_type_alone_is_no_reason_to_refuse():
    names = replaced(sparsify(t5(), Masked(sparsity=0.5)))
    assert "encoder.block.0.layer.1.DenseReluDense.wo" in names


def a_layer(**options: Any) -> SparseLowRankLinear:
    layer = SparseLowRankLinear(12, 8, rank=3, density=0.1, alpha=3.0, **options)
    nn.init.normal_(layer.b)
    layer.path = "blocks.3.up"
    return layer


class Fused(torch.autograd.Function):
    """A kernel with a backward pass of its own, which would have the gradient and lose it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise AssertionError("not reached")


def below_torch_functions(weight: Tensor) -> Tensor:
    # as C++ does
    with torch._C.DisableTorchFunctionSubclass():
        return weight.t()


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda w: Fused.apply(torch.ones(2, 12), w), id="own backward"),
        pytest.param(lambda w: w.data_ptr(), id="pointer"),
        pytest.param(lambda w: w.untyped_storage(), id="storage"),
        pytest.param(lambda w: w.data, id="data"),
        pytest.param(lambda w: w.requires_grad_(False), id="flag"),
        pytest.param(lambda w: setattr(w, "data", torch.ones(8, 12)), id="assignment"),
        pytest.param(lambda w: nn.init.normal_(w), id="initial values"),
        pytest.param(lambda w: torch.no_grad()(w.copy_)(torch.ones(8, 12)), id="copy"),
        pytest.param(below_torch_functions, id="below torch's functions"),
    ],
)
def test_uses_that_would_be_lost_are_refused(use: Callable[[Tensor], Any]):
    layer = a_layer()
    message = r"^blocks\.3\.up has no dense weight in memory.* exclude=\('blocks\.\*\.up',\) to the"
    with pytest.raises(NotImplementedError, match=message):
        use(layer.weight)


def test_without_gradients_a_kernel_gets_the_matrix():
    layer = a_layer()
    x = torch.randn(2, 12)
    with torch.no_grad():
        result = Fused.apply(x, layer.weight)
        assert isinstance(result, Tensor)
        torch.testing.assert_close(result, x @ layer.dense_weight().T)


# dynamo makes an instance of every torch.autograd.Function, which torch warns of
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_reader_has_the_gradients():
    layer = a_layer(bias=False)
    x = torch.randn(5, 12)
    read = torch.compile(lambda x: x @ layer.weight.T, fullgraph=True, backend="aot_eager")
    for y in (read(x), x @ layer.weight.T):
        got = torch.autograd.grad(y.square().sum(), [*layer.parameters()])
        wanted = torch.autograd.grad(layer(x).square().sum(), [*layer.parameters()])
        torch.testing.assert_close(got, wanted)


def mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def test_that_experts_stay_dense_is_said_once(warnings):
    model = sparsify(mixtral(), LowRank(rank=4))
    assert not any("experts" in name for name in replaced(model))
    experts = 2 * 3 * 3 * 32 * 48  # layers, experts, gate and up and down
    every = sum(parameter.numel() for parameter in model.parameters())
    assert warnings() == [
        f"{experts} of {every} parameters are matrices stacked in one tensor, such as experts, and "
        "stay dense: model.layers.*.mlp.experts.gate_up_proj (2), "
        "model.layers.*.mlp.experts.down_proj (2); exclude them to say so"
    ]
    assert loss_and_gradients(model)[0].isfinite()


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(LowRank(rank=4, exclude=("*.experts",)), id="excluded"),
        pytest.param(LowRank(rank=4, include=("*.self_attn.*",)), id="not included"),
    ],
)
def test_nothing_is_said_of_experts_that_are_not_meant(rule: Rule, warnings):
    sparsify(mixtral(), rule)
    assert warnings() == []


def test_convolutions_and_our_own_layers_are_no_stacks(warnings):
    sparsify(mamba(), Monarch(blocks=4))
    sparsify(t5(), Block(blocks=4))
    assert warnings() == []
