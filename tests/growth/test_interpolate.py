"""Interpolation between a large model and a small one: weights are between, and nothing else."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from apical.growth.apply import grow
from apical.growth.interpolate import Interpolate
from apical.growth.operators import Coalesce, Decoalesce, Stack


def _levels(tiny, family):
    """A large model, and its small one after some training."""
    large = grow(tiny(family, dtype=torch.float64), Decoalesce(2))
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    small = grow(large, Coalesce(2))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return large, small


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0], ids=["the large one", "the paper's", "small"])
def test_every_weight_is_between_the_two_models(tiny, any_family, alpha):
    large, small = _levels(tiny, any_family)
    grown = grow(small, Decoalesce()).state_dict()
    found = Interpolate(alpha).models(large, small)
    assert found.config.to_dict() == large.config.to_dict()
    for name, old in large.state_dict().items():
        expected = (1 - alpha) * old + alpha * grown[name]
        torch.testing.assert_close(found.state_dict()[name], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2-window-from-layer-2"])
def test_directories_give_the_same(tiny, family, tmp_path, run):
    large, small = _levels(tiny, family)
    large.save_pretrained(tmp_path / "large")
    small.save_pretrained(tmp_path / "small")
    Interpolate(0.5).checkpoints(tmp_path / "large", tmp_path / "small", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "out", "small"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    torch.testing.assert_close(run(found), run(Interpolate(0.5).models(large, small)))


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")], ids=["below", "above", "no number"])
def test_alpha_is_a_share(alpha):
    with pytest.raises(ValueError, match=r"alpha is .*; expected a number from 0 to 1"):
        Interpolate(alpha)


def test_models_of_other_sizes_are_refused(tiny):
    large, small = _levels(tiny, "llama-tied")
    with pytest.raises(ValueError, match=r"hidden_size is 32 in the config of models"):
        Interpolate().models(large, small, by=Stack(2))
    with pytest.raises(ValueError, match="between 2 models, got 3"):
        Interpolate().coefficients(3)


def test_a_model_that_computes_something_else_is_refused(tiny):
    large, small = _levels(tiny, "llama-tied")
    small.config.rms_norm_eps = 0.5
    with pytest.raises(ValueError, match="rms_norm_eps"):
        Interpolate().models(large, small)
