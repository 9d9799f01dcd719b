"""A model up to its head gives what its logits are made of, whatever the family does to them."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import apical
from apical.growth.train.head import run_to_head

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "plain, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "a soft cap, small enough to bend": {"model_type": "gemma2", "final_logit_softcapping": 2.0},
    "a factor": {"model_type": "cohere", "logit_scale": 0.3},
    "a divisor": {"model_type": "granite", "logits_scaling": 3.0},
    "a bias": {"model_type": "phi"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_logits_can_be_made_of_what_comes_back(family: str, training: bool):
    torch.manual_seed(0)
    options = {
        key: SIZES[key]
        for key in SIZES
        if FAMILIES[family]["model_type"] != "phi" or key != "head_dim"
    }
    config = AutoConfig.for_model(**(options | FAMILIES[family]))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float64).train(training)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    if hasattr(config, "resid_pdrop"):
        assert config.resid_pdrop == 0
    ids = torch.arange(11)[None] * 3
    expected = model(input_ids=ids).logits[0]
    # the hooks of the fused loss are on the head at the same time
    apical.use_kernels(model, attention=False)
    inputs = {"input_ids": ids, "labels": ids}
    hidden, weight, head = run_to_head(model, inputs)
    bias = 0 if head["linear_bias"] is None else head["linear_bias"]
    logits = (hidden @ weight.T + bias) * head["logit_scale"]
    if head["softcap"]:
        logits = head["softcap"] * torch.tanh(logits / head["softcap"])
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    # and the model is as it was
    torch.testing.assert_close(model(input_ids=ids).logits[0], expected)
