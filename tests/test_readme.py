"""The README does what it says: its code blocks run, its links and targets exist."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from apical.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the fenced code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Return the lines of the shell blocks, without comments, split into words."""
    lines = (line for block in blocks("sh") for line in block.splitlines())
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_make_targets_exist():
    targets = [words[1] for words in commands() if words[0] == "make"]
    assert {"demo", "test"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_commands_and_code_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # one folder, one order: a later block uses what an earlier command wrote
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("APICAL_CACHE", str(tmp_path / "cache"))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    ran = [words for words in commands() if words[0] == "apical" and words[1] != "bench"]
    assert {"train", "grow", "info"} <= {words[1] for words in ran}
    for words in ran:
        assert main(words[1:]) in (0, None), words
    scope: dict[str, object] = {}
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)


def test_links_point_at_files():
    targets = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_every_number_has_its_file():
    # a measured table names the file under bench/results/ that shows it
    for match in re.finditer(r"^\|.*\d[×x].*\|$", README, flags=re.MULTILINE):
        before = README[: match.start()].rsplit("\n## ", 1)[-1]
        assert "bench/results/" in before + README[match.start() :].split("\n## ", 1)[0]
