import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from apical import use_kernels
from apical.hf.prefill import prepack

_WINDOW = 4
# model, options; grouped-query, norms on queries and keys, learned positions, one fused projection
# of all three, positions with an offset, a window
_FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gpt2": {},
    "phi3": {},
    "opt": {},
    "mistral": {"sliding_window": _WINDOW},
}
# one token; several; more than a window, as many, one less; out of order
_RAGGED = (5, 1, 9, 3, 4)
_BATCHES = {
    "ragged": _RAGGED,
    # no padding at all
    "equal": (6, 6, 6),
    "alone": (7,),
    # nothing is left in the cache when the last token is withheld
    "single-tokens": (1, 1),
    # shorter than the window, and as long
    "inside-window": (2, _WINDOW - 1),
    "window": (_WINDOW, 2),
}


# what lengths do to a cache depends on its kind alone
_CASES = [(family, "ragged") for family in _FAMILIES]
_CASES += [(family, name) for family in ("llama", "mistral") for name in list(_BATCHES)[1:]]


@pytest.fixture
def models(build):
    """Return a function that builds a stock model and an equal one with the kernels."""

    def build_models(family: str):
        # in double precision: no two tokens are equally likely
        stock = build(family, torch.float64, **_FAMILIES[family])
        return stock, use_kernels(copy.deepcopy(stock), loss=False)

    return build_models


@pytest.fixture
def llama(build):
    return use_kernels(build("llama", torch.float64), loss=False)


def _prompts(lengths) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 61, (length,), generator=generator) for length in lengths]


def _padded(prompts, side: str) -> dict[str, torch.Tensor]:
    length = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        where = slice(length - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, where], mask[row, where] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def _prefill(model, prompts):
    """Return what a model leaves after the left-padded batch."""
    batch = _padded(prompts, "left")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(**batch, position_ids=positions, use_cache=True)


def _assert_same_cache(got: Any, want: Any, mask: torch.Tensor) -> None:
    assert got.get_seq_length() == want.get_seq_length()
    assert [type(layer) for layer in got.layers] == [type(layer) for layer in want.layers]
    for ours, theirs in zip(got.layers, want.layers, strict=True):
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        real = mask[:, mask.shape[1] - theirs.keys.shape[2] :, None].bool()
        for states, expected in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert states.shape == expected.shape
            states, expected = states.transpose(1, 2), expected.transpose(1, 2)  # (B, L, K, D)
            torch.testing.assert_close(
                states, expected.where(real[..., None], 0), rtol=1e-11, atol=1e-12
            )


def _layers(prefilled) -> list[Any]:
    return prefilled.past_key_values.layers


def _assert_same_bits(got, want) -> None:
    for name in ("input_ids", "attention_mask", "position_ids", "logits"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for ours, theirs in zip(_layers(got), _layers(want), strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize(("family", "name"), _CASES)
def test_leaves_what_the_padded_batch_leaves(models, family, name):
    (stock, model), lengths = models(family), _BATCHES[name]
    prompts = _prompts(lengths)
    got, want = prepack(model, prompts), _prefill(stock, prompts)
    batch = _padded(prompts, "left")
    assert torch.equal(got.attention_mask, batch["attention_mask"])
    assert torch.equal(got.input_ids, batch["input_ids"])
    assert got.position_ids.flatten().tolist() == list(lengths)
    torch.testing.assert_close(got.logits, want.logits[:, -1], rtol=1e-10, atol=1e-11)
    assert type(got.past_key_values) is DynamicCache
    _assert_same_cache(got.past_key_values, want.past_key_values, got.attention_mask)


@pytest.mark.parametrize(("family", "name"), _CASES)
def test_generates_what_the_padded_batch_generates(models, family, name):
    (stock, model), lengths = models(family), _BATCHES[name]
    prefilled = prepack(model, _prompts(lengths))
    # past the window, and past the prompts
    options = {"max_new_tokens": 12, "do_sample": False}
    want = stock.generate(**_padded(_prompts(lengths), "left"), **options)
    assert torch.equal(prefilled.generate(**options), want)


def test_generates_by_the_former_attention(models):
    stock, model = models("mistral")
    prefilled = prepack(model, _prompts(_RAGGED))
    use_kernels(model, attention=False, loss=False)
    assert model.config._attn_implementation == stock.config._attn_implementation
    want = stock.generate(**_padded(_prompts(_RAGGED), "left"), max_new_tokens=8)
    assert torch.equal(prefilled.generate(max_new_tokens=8), want)


@pytest.mark.parametrize("family", _FAMILIES)
def test_decoding_by_hand_goes_on(models, family):
    stock, model = models(family)
    prefilled, steps = prepack(model, _prompts(_RAGGED)), 8
    cache, mask = prefilled.past_key_values, prefilled.attention_mask
    tokens, logits = [], prefilled.logits
    for step in range(steps):
        tokens.append(logits.argmax(1, keepdim=True))
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        logits = model(
            tokens[-1],
            attention_mask=mask,
            position_ids=prefilled.position_ids + step,
            past_key_values=cache,
        ).logits[:, -1]
    assert cache.get_seq_length() == max(_RAGGED) + steps
    batch = _padded(_prompts(_RAGGED), "left")
    want = stock.generate(**batch, max_new_tokens=steps, min_new_tokens=steps, eos_token_id=None)
    assert torch.equal(torch.cat(tokens, 1), want[:, max(_RAGGED) :])
    # decoding grew its own cache and left the memory of the prompts alone
    again = prefilled.generate(max_new_tokens=steps, min_new_tokens=steps, eos_token_id=None)
    assert torch.equal(again, want)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=["beams", "best-beams", "samples"],
)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_beams_and_samples(models, family, options):
    stock, model = models(family)
    prefilled = prepack(model, _prompts(_RAGGED))
    seen = []
    for generate in (prefilled.generate, None):
        torch.manual_seed(5)
        batch = {} if generate else _padded(_prompts(_RAGGED), "left")
        seen.append((generate or stock.generate)(**batch, max_new_tokens=6, **options))
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    "form",
    [
        lambda prompts: {"input_ids": [prompt.tolist() for prompt in prompts]},
        # what a tokenizer returns without padding
        lambda prompts: {
            "input_ids": [prompt.int() for prompt in prompts],
            "attention_mask": [[1] * len(prompt) for prompt in prompts],
        },
        lambda prompts: _padded(prompts, "left"),
        lambda prompts: _padded(prompts, "right"),
    ],
    ids=["lists", "with-masks", "left", "right"],
)
def test_forms_of_a_batch(llama, form):
    prompts = _prompts(_RAGGED)
    _assert_same_bits(prepack(llama, **form(prompts)), prepack(llama, prompts))


# as many tokens as the longest prompt; two prompts in one row and others alone; one row
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(("max_tokens", "forwards"), [(9, 3), (12, 2), (22, 1), (None, 1)])
def test_computes_real_tokens_in_rows_of_at_most_max_tokens(models, family, max_tokens, forwards):
    _, model = models(family)
    rows: list[int] = []
    head_rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, options: rows.append(options["input_ids"].numel()), with_kwargs=True
    )
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: head_rows.append(args[0][..., 0].numel())
    )
    got = prepack(model, _prompts(_RAGGED), max_tokens=max_tokens)
    assert len(rows) == forwards
    assert sum(rows) == sum(_RAGGED)
    assert max(rows) <= (max_tokens or sum(_RAGGED))
    assert sum(head_rows) == len(_RAGGED)
    want = _prefill(model, _prompts(_RAGGED))
    torch.testing.assert_close(got.logits, want.logits[:, -1], rtol=1e-10, atol=1e-11)
    _assert_same_cache(got.past_key_values, want.past_key_values, got.attention_mask)


def test_a_window_keeps_only_its_columns(build):
    model = use_kernels(build("mistral", torch.float64, sliding_window=_WINDOW), loss=False)
    layer = _layers(prepack(model, _prompts(_RAGGED)))[0]
    assert layer.is_sliding
    # one more than the window sees: generate begins without the last token
    held = layer.keys.untyped_storage().nbytes() // layer.keys.element_size()
    batch, heads, _, size = layer.keys.shape
    assert held == batch * heads * _WINDOW * size


def test_no_graph_and_no_trace(llama):
    before, config = copy.deepcopy(llama.state_dict()), copy.deepcopy(llama.config)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules()]
    prefilled = prepack(llama.train(), _prompts(_RAGGED))
    assert llama.training
    assert not prefilled.logits.requires_grad
    assert not _layers(prefilled)[0].keys.requires_grad
    assert llama.config.to_dict() == config.to_dict()
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules()]
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


def test_half_precision_and_its_cache(build):
    model = use_kernels(build("llama", torch.bfloat16), loss=False)
    exact = _prefill(build("llama", torch.float64), _prompts(_RAGGED)).logits[:, -1]
    plain = _prefill(build("llama", torch.bfloat16), _prompts(_RAGGED)).logits[:, -1]
    prefilled = prepack(model, _prompts(_RAGGED))
    assert _layers(prefilled)[0].keys.dtype == torch.bfloat16
    error, theirs = ((x.double() - exact).norm() for x in (prefilled.logits, plain))
    assert error <= 2 * theirs + torch.finfo(torch.bfloat16).eps * exact.norm()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": []}, "input_ids holds no prompts"),
        ({"input_ids": [[4, 5], []]}, "prompt 1 is empty"),
        ({"input_ids": [[4, 5], [6, 7]], "attention_mask": [[0, 0], [1, 1]]}, "prompt 0 is empty"),
        ({"input_ids": [[4, 5]], "attention_mask": [[1, 1, 1]]}, "attention_mask differs in form"),
        ({"input_ids": [[4, 5]], "attention_mask": [[1, 1]] * 2}, "attention_mask differs in form"),
        # one prompt that is no batch
        ({"input_ids": torch.tensor([4, 5])}, "prompt 0 is 0-D"),
        ({"input_ids": [[4.0, 5.0]]}, "prompt 0 is 1-D of torch.float32"),
        ({"input_ids": [[4], [5, 6, 7]], "max_tokens": 2}, "max_tokens is 2, but prompt 1 has 3"),
    ],
)
def test_bad_prompts_are_named(llama, batch, message):
    with pytest.raises(ValueError, match=message):
        prepack(llama, **batch)


def test_models_that_cannot_are_named(build, llama):
    with pytest.raises(ValueError, match=r"attends by 'sdpa'.* call apical.use_kernels"):
        prepack(build("llama"), [[4, 5]])
    with pytest.raises(NotImplementedError, match="LlamaModel takes no logits_to_keep"):
        prepack(llama.model, [[4, 5]])
    # under its name of today, or its former one
    current = hasattr(llama, "activation_checkpointing_enable")
    getattr(llama, f"{'activation' if current else 'gradient'}_checkpointing_enable")()
    llama.train()
    with pytest.raises(ValueError, match=r"filled no cache; call model.eval\(\)"):
        prepack(llama, [[4, 5]])


def test_caches_of_another_kind_are_named(llama, monkeypatch):
    # as of a model whose layers keep one state for all tokens
    monkeypatch.setattr(llama.config, "layer_types", ["linear_attention"] * 2, raising=False)
    with pytest.raises(NotImplementedError, match=r"a cache with a Linear\w+ cannot be filled"):
        prepack(llama, [[4, 5]])
