"""The documentation's example runs."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[3] / "docs" / "objectives.md"


def test_the_example_gives_losses_with_gradients():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    scope: dict[str, torch.Tensor] = {}
    exec(compile(block, PAGE.name, "exec"), scope)  # pyright: ignore[reportArgumentType]
    scope["loss"].backward()
    assert scope["hidden"].grad is not None
    # a token without a label learns nothing
    assert scope["hidden"].grad.abs().sum(1).ne(0).tolist() == [1, 1, 0, 1, 1, 0]
