"""What attention functions are asked for beyond plain attention."""

import copy

import pytest
import torch
import transformers
from torch import nn

from apical import varlen_attention
from apical.hf import explain, use_kernels
from apical.hf.attention import attend
from apical.hf.layout import Layout

CPU = torch.device("cpu")


def module_of(*, causal: bool) -> nn.Module:
    module = nn.Module()
    vars(module)["is_causal"] = causal
    return module


def dense(query, key, value, seen, *, softcap=None, sinks=None):
    """Return attention under a mask (I, J) as (B, I, H, E), by transformers' eager formula."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:3], 1)), -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


# W keys to the left, the token itself among them; W - 1 on each side where both are seen
@pytest.mark.parametrize("causal", [True, False])
# the token alone, some, all but one, exactly all, more than there are
@pytest.mark.parametrize("window", [1, 4, 11, 12, 40])
# no cache; keys of a full cache; what a cache of window 4 has kept
@pytest.mark.parametrize(("past", "columns"), [(0, 12), (7, 12), (7, 8)])
def test_windows_count_the_token_itself(causal, window, past, columns):
    queries, total = 12 - past, 12
    query = torch.randn(2, 4, queries, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, columns, 8, dtype=torch.float64)
    here = torch.arange(past, total)[:, None]
    there = torch.arange(total - columns, total)[None]
    seen = (here - there).abs() < window
    seen = seen & (there <= here) if causal else seen
    layout = Layout(
        torch.tensor([0, queries, 2 * queries]), None, rows=(2, queries), past=past, device=CPU
    )
    out, weights = attend(
        module_of(causal=causal),
        query,
        key,
        value,
        None,
        sliding_window=window,
        apical_layout=layout,
    )
    assert weights is None
    assert (out - dense(query, key, value, seen)).abs().max() <= 1e-12


def test_softcap_sinks_and_values_of_another_size_reach_the_kernel():
    query = torch.randn(2, 4, 12, 8, dtype=torch.float64)
    key = torch.randn(2, 2, 12, 8, dtype=torch.float64)
    value = torch.randn(2, 2, 12, 5, dtype=torch.float64)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    layout = Layout(torch.tensor([0, 12, 24]), None, rows=(2, 12), past=0, device=CPU)
    expected = dense(query, key, value, seen, sinks=sinks)
    module = module_of(causal=True)
    ours, _ = attend(module, query, key, value, None, s_aux=sinks, apical_layout=layout)
    assert (ours - expected).abs().max() <= 1e-12
    theirs, mine = (torch.autograd.grad(x.square().sum(), sinks)[0] for x in (expected, ours))
    assert (mine - theirs).abs().max() <= 1e-12
    capped, _ = attend(module, query, key, value, None, softcap=0.7, apical_layout=layout)
    assert (capped - dense(query, key, value, seen, softcap=0.7)).abs().max() <= 1e-12
    # None and 0 are no cap
    for cap in (None, 0.0):
        plain, _ = attend(module, query, key, value, None, softcap=cap, apical_layout=layout)
        assert (plain - dense(query, key, value, seen)).abs().max() <= 1e-12


def test_dropout_is_drawn_from_torchs_generator():
    query, key, value = torch.randn(3, 1, 4, 12, 8)
    layout = Layout(torch.tensor([0, 12]), None, rows=(1, 12), past=0, device=CPU)
    torch.manual_seed(3)
    ours, _ = attend(
        module_of(causal=True), query, key, value, None, dropout=0.4, apical_layout=layout
    )
    torch.manual_seed(3)
    seed = torch.randint(0, 2**63 - 1, (1,))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    bounds = torch.tensor([0, 12])
    expected = varlen_attention(q, k, v, bounds, causal=True, dropout_p=0.4, dropout_seed=seed)
    assert torch.equal(ours[0], expected)


DROPPED = {
    "gpt2": "attn_pdrop",
    "bert": "attention_probs_dropout_prob",
    "llama": "attention_dropout",
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_is_for_training_alone(build, batch, name):
    model = build(name, **{DROPPED[name]: 0.5})
    inputs, _ = batch("right")
    expected = model(**inputs).logits
    use_kernels(model, loss=False)
    assert "dropout 0.5 in training" in explain(model)
    real = inputs["attention_mask"].bool()
    assert (model.eval()(**inputs).logits - expected)[real].abs().max() <= 1e-4
    model.train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model(**inputs).logits[real])
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] - drawn[2]).abs().max() > 1e-2


def test_dropout_is_the_same_when_a_layer_is_computed_again(build, batch, checkpointed):
    model = use_kernels(build("llama", torch.float64, attention_dropout=0.3)).train()
    inputs, labels = batch("left")

    def gradients():
        torch.manual_seed(5)
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    checkpointed(model)
    for mine, other in zip(gradients(), plain, strict=True):
        assert (mine - other).abs().max() <= 1e-12


def test_mean_over_dropout_is_attention_without_it():
    query, key, value = torch.randn(3, 1, 2, 6, 4)
    layout = Layout(torch.tensor([0, 6]), None, rows=(1, 6), past=0, device=CPU)
    module = module_of(causal=False)

    def call(dropout: float) -> torch.Tensor:
        inputs = query, key, value, None
        return attend(module, *inputs, dropout=dropout, apical_layout=layout)[0]

    torch.manual_seed(0)
    draws = torch.stack([call(0.2) for _ in range(200)])
    # of 192 means, one in 10000 is more than four standard errors away
    error = (draws.mean(0) - call(0.0)) / (draws.std(0) / 200**0.5)
    assert error.abs().max() <= 5


def test_a_text_model_that_looks_both_ways(batch):
    config = transformers.Gemma3TextConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        # halved by the configuration: both sides
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        use_bidirectional_attention=True,
    )
    stock = transformers.Gemma3TextModel(config).double().eval()
    ours = use_kernels(copy.deepcopy(stock), loss=False)
    inputs, _ = batch("left")
    theirs, mine = (model(**inputs, use_cache=False).last_hidden_state for model in (stock, ours))
    assert (mine - theirs)[inputs["attention_mask"].bool()].abs().max() <= 1e-6
    changed = inputs["input_ids"].clone()
    changed[:, -1] = 5
    other = ours(changed, attention_mask=inputs["attention_mask"]).last_hidden_state
    assert (other - mine)[:, 9].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "options", "traits"),
    [
        ("mistral-window", {}, ", sliding window 4; "),
        ("gemma2", {}, ", sliding window 4 in some layers, softcap 50.0; "),
        ("gpt_oss", {}, ", sliding window 4 in some layers, sinks; "),
        ("gpt2", {"attn_pdrop": 0.1}, ", dropout 0.1 in training; "),
    ],
)
def test_explain_says_what_attention_does(build, name, options, traits):
    assert f"packed documents{traits}" in explain(use_kernels(build(name, **options), loss=False))
