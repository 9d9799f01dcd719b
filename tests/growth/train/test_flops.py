"""FLOPs: against torch's own counter, and against sums written out by hand."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from apical.growth.train.flops import TrainingCost, causal_pairs, cost_of_config, training_cost

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"tie_word_embeddings": True}, id="tied-head-still-multiplies"),
        pytest.param({"tie_word_embeddings": False}, id="untied"),
        pytest.param({"head_dim": 16}, id="heads-wider-than-the-model"),
        pytest.param({"num_key_value_heads": 4}, id="no-groups"),
        pytest.param({"model_type": "qwen3", "head_dim": 8}, id="another-family"),
    ],
)
@pytest.mark.parametrize(
    "length",
    [
        pytest.param(8, id="weights-dominate"),
        pytest.param(256, id="attention-dominates"),
    ],
)
def test_cost_agrees_with_torch(options: dict[str, Any], length: int):
    config = AutoConfig.for_model(**({"model_type": "llama"} | _SIZES | options))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.randint(0, 300, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    # eager attention multiplies all pairs, also those that the mask then hides
    ours = training_cost(model, config).flops(tokens=2 * length, pairs=2 * length**2)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert cost_of_config(config) == training_cost(model, config)


def test_cost_by_hand():
    # one token on its own: 6 for each weight, 12 for each channel of its own pair
    assert TrainingCost(weights=100, attention=8).flops(tokens=1, pairs=1) == 600 + 96


@pytest.mark.parametrize(
    ("lengths", "pairs"),
    [
        pytest.param([1], 1, id="a-token-sees-itself"),
        pytest.param([3, 2], 6 + 3, id="not-across-documents"),
        pytest.param([], 0, id="empty"),
    ],
)
def test_causal_pairs(lengths: list[int], pairs: int):
    assert causal_pairs(lengths) == pairs
