"""The pages about growing do what they say: their code runs, and every operator has its picture."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from apical.cli import main
from apical.growth.operators import OPERATORS

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("growth.md", "planning_growth.md")


def _blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    # sizes that the page's options grow: hidden 64 to 96, heads 4 to 6, ffn 172 to 256
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "SRC")
    return tmp_path / "SRC"


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page, source, tmp_path, capsys):
    lines = [line for block in _blocks(page, "sh") for line in block.splitlines()]
    assert lines
    for number, line in enumerate(lines):
        places = {"SRC": str(source), "OUT": str(tmp_path / f"out{number}")}
        words = [places.get(word, word) for word in shlex.split(line, comments=True)]
        assert words[0] == "apical"
        assert main(words[1:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES)
def test_code_runs_in_order(page):
    scope: dict[str, object] = {}
    assert _blocks(page, "python")
    for block in _blocks(page, "python"):
        exec(compile(block, page, "exec"), scope)


def test_the_law_prints_what_the_page_shows(capsys):
    shown = _blocks("planning_growth.md", "text")[0]
    command = shlex.split(_blocks("planning_growth.md", "sh")[0].splitlines()[0], comments=True)
    assert main(command[1:]) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_a_row_and_a_picture(operator):
    page = (DOCS / "growth.md").read_text()
    assert re.search(rf"^\| \[?`{operator}`", page, flags=re.MULTILINE)
    # new ones are drawn by docs/draw_operators.py
    assert f"pictures/{operator}.svg" in page


def test_pictures_are_there():
    for page in PAGES:
        for target in re.findall(r"!\[.*?\]\((.*?)\)", (DOCS / page).read_text()):
            assert "<svg" in (DOCS / target).read_text()[:500], target
