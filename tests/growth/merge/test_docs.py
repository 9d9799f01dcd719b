"""The page's examples run."""

import re
import shlex
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from apical.growth.merge.named import named

PAGE = Path(__file__).parents[3] / "docs" / "merging.md"
TEXT = PAGE.read_text()


def test_the_code_runs_and_merges(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), scope)
    states = [model.state_dict() for model in scope["models"]]
    loaded = AutoModelForCausalLM.from_pretrained("soup").state_dict()
    for name, weight in scope["merged"].state_dict().items():
        one, two, three = (state[name].double() for state in states)
        torch.testing.assert_close(weight.double(), (one + two + three) / 3, rtol=1e-5, atol=1e-7)
        expected = 0.8 * (0.8 * one + 0.2 * two) + 0.2 * three
        found = scope["weights"][name].double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        expected = (2 * one + two + three) / 4
        torch.testing.assert_close(loaded[name].double(), expected, rtol=1e-5, atol=1e-7)
    assert scope["score"](scope["best"]) >= max(map(scope["score"], scope["models"]))
    assert scope["shares"] == (0.5, 0.25, 0.25)


def test_the_commands_name_methods_with_what_they_need(tmp_path):
    (tmp_path / "held-out.txt").write_text("text")
    (block,) = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len(lines) == 8
    for words in lines:
        at = [i for i, word in enumerate(words) if word.startswith("--")]
        ends = [*at, len(words)][1:]
        options = {words[i][2:]: words[i + 1 : end] for i, end in zip(at, ends, strict=True)}
        method: Any = named(
            options.get("method", ["average"])[0],  # type: ignore[arg-type]
            weights=tuple(map(float, options.get("weights", []))),
            decay=float(options["decay"][0]) if "decay" in options else None,
            text=tmp_path / options["text"][0] if "text" in options else None,
        )
        sources = [word for word in words[3 : at[0] if at else None] if word != "..."]
        if "text" not in options:
            assert len(method.coefficients(len(sources))) == len(sources)
