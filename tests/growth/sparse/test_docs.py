"""The documentation's example runs."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from apical.growth.sparse import SparseLowRankLinear, replaced

PAGE = Path(__file__).parents[3] / "docs" / "sparse.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_the_example_trains_a_converted_model():
    block = blocks()[0]
    scope: dict[str, Any] = {}
    exec(compile(block, PAGE.name, "exec"), scope)
    layers = replaced(scope["model"]).values()
    assert len(layers) == 2 * 7
    for layer in layers:
        assert isinstance(layer, SparseLowRankLinear)
        # B is 0 in the beginning, so A has no gradient yet
        assert layer.b.grad is not None
        assert layer.b.grad.any()
    x = torch.randn(3, 64)
    torch.testing.assert_close(scope["dense"](x), scope["layer"](x))


def test_what_it_saves_is_loaded_and_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in blocks():
        exec(compile(block, PAGE.name, "exec"), scope)
    # bfloat16, as the example asks
    stock = AutoModelForCausalLM.from_pretrained("dense")
    for name, weight in scope["model"].state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(stock.state_dict()[name], weight)
