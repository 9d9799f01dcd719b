import pytest
import torch
from transformers import DynamicCache

from apical.hf import use_kernels

# windows shorter than the text; sinks; full attention; positions that skip padding
_GENERATING = ["llama", "mistral-window", "gemma3", "gpt_oss", "gpt2", "opt", "stablelm"]


def generate(model, inputs, **options) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)


# rows padded on the right are left out: their next token would be computed from padding
@pytest.mark.parametrize("name", _GENERATING)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("full", {}),
        ("left", {}),
        # every token anew: padded rows without a cache run as one packed row
        ("left", {"use_cache": False}),
        # keys in a buffer longer than the text, a window's own shorter
        ("left", {"cache_implementation": "static"}),
        # the cache is reordered
        ("left", {"num_beams": 3}),
    ],
    ids=["full", "left", "no-cache", "static", "beams"],
)
def test_generation_is_the_same(pair, batch, name, kind, options):
    stock, patched = pair(name)
    inputs, _ = batch(kind)
    assert torch.equal(generate(patched, inputs, **options), generate(stock, inputs, **options))


@pytest.mark.parametrize("name", _GENERATING)
@pytest.mark.parametrize("kind", ["full", "left"])
@pytest.mark.parametrize("mixed", [False, True], ids=["full-cache", "own-cache"])
def test_cached_keys_are_seen_in_pieces(pair, batch, name, kind, mixed):
    # experts are not computed in float64, eager attention takes its softmax in float32
    dtype, bound = (torch.float32, 1e-4) if name == "gpt_oss" else (torch.float64, 1e-10)
    stock, patched = pair(name, dtype)
    inputs, labels = batch(kind)
    expected = stock(**inputs).logits
    mask = inputs.get("attention_mask", torch.ones_like(labels))
    # all keys of every layer; only those in the window, where there is one
    cache, pieces = DynamicCache(config=patched.config if mixed else None), []
    # one token, several, and a piece that is partly padding
    for begin, end in ((0, 3), (3, 8), (8, 9), (9, 12)):
        piece = {"input_ids": inputs["input_ids"][:, begin:end], "attention_mask": mask[:, :end]}
        pieces.append(patched(**piece, past_key_values=cache, use_cache=True).logits)
    assert (torch.cat(pieces, 1) - expected)[mask.bool()].abs().max() <= bound


def test_a_cache_comes_out_of_a_padded_prompt_in_evaluation(build, batch):
    model = use_kernels(build("llama"))
    inputs, _ = batch("left")
    cache = model(**inputs).past_key_values
    assert cache.layers[0].keys.shape == (2, 2, 12, 8)
    # in training it is left out, unless it is asked for
    assert model.train()(**inputs).past_key_values is None
    assert model.model(**inputs).past_key_values is None
    assert model(**inputs, use_cache=True).past_key_values is not None
