"""The report says what the records say, and needs nothing beside itself."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from apical.growth.train.compare import Comparison, scratch_recipe
from apical.growth.train.recipe.schema import Recipe, load_recipe
from apical.growth.train.results.metrics import read_metrics
from apical.growth.train.results.summary import summarise
from apical.growth.train.run import train


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    """The directory of one finished and compared run, made by the first test that asks."""
    return {}


@pytest.fixture
def root(
    tiny_recipe: Recipe, made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if not made:
        output = tmp_path_factory.mktemp("report") / "run"
        made["it"] = train(tiny_recipe, output=output, compare="scratch")
    return made["it"]


def markdown_rows(text: str, title: str) -> list[dict[str, str]]:
    """Return the rows of the table under a title."""
    section = text.split(f"## {title}")[1].split("\n\n")[1]
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()
    ]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_loss_table_holds_what_was_recorded(root: Path):
    records = read_metrics(root / "metrics.jsonl")
    evals = {(r["stage"], r["when"]): r for r in records if r["kind"] == "eval"}
    final = records[-1]
    rows = markdown_rows((root / "report.md").read_text(), "Loss per domain")
    assert [(row["stage"], row["domain"]) for row in rows] == [
        (stage, domain)
        for stage in ("pretrain", "grow", "continue")
        for domain in ("prose", "code")
    ]
    for row in rows:
        stage, key = row["stage"], f"loss/{row['domain']}"
        before, after = evals[stage, "before"][key], evals[stage, "after"][key]
        assert row["before"] == f"{before:.4f}"
        assert row["after"] == f"{after:.4f}"
        assert row["change"] == f"{after - before:+.4f}"
        bits = evals[stage, "after"][f"bits_per_byte/{row['domain']}"]
        assert row["bits/byte"] == f"{bits:.4f}"
        # code comes in the last stage, so there prose is what may be forgotten, and only there
        forgotten = (stage, row["domain"]) == ("continue", "prose")
        assert row["forgetting"] == (f"{after - before:+.4f}" if forgotten else "")
        if forgotten:
            assert final["loss_forgetting/continue/prose"] == after - before
        if stage == "continue":
            assert final[key] == after


def test_cost_table_holds_what_was_recorded(root: Path):
    records = read_metrics(root / "metrics.jsonl")
    rows = markdown_rows((root / "report.md").read_text(), "Cost")
    total = 0
    for row in rows:
        own = [r for r in records if r.get("stage") == row["stage"]]
        trained = [r for r in own if r["kind"] == "train"]
        tokens = sum(sum(r["tokens_by_source"].values()) for r in trained)
        total += tokens
        assert row["tokens"] == f"{tokens:,}"
        assert row["steps"] == f"{own[0]['steps']:,}"
        assert row["parameters"] == f"{own[0]['parameters']:,}"
        assert row["FLOPs"] == f"{own[-1]['flops'] - own[1]['flops']:.3e}"
        assert row["tokens/s"] == f"{tokens / sum(r['seconds'] for r in trained):,.0f}"
    assert total == records[-1]["tokens"]
    assert re.fullmatch(r"code \d+%, prose \d+%", rows[-1]["of which"])


def test_bits_per_byte_follow_from_the_loss(root: Path):
    # the sources' text is ASCII, so its length is its bytes
    (record, *_) = [r for r in read_metrics(root / "metrics.jsonl") if r["kind"] == "eval"]
    held_out = read_metrics(root / "metrics.jsonl")[0]["data"]["tokens"]["prose, val, context 24"]
    predicted = held_out["tokens"] - held_out["documents"]
    nats_per_byte = record["loss/prose"] * predicted / held_out["bytes"]
    assert record["bits_per_byte/prose"] == pytest.approx(nats_per_byte / 0.6931471805599453)


class Page(HTMLParser):
    """Collects what a page refers to, its cells and its preformatted text."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text: dict[str, list[str]] = {"td": [], "pre": []}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in {"src", "href", "xlink:href"}]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in self.text:
            self.text[self.tags[-1]].append(data)


def test_page_is_whole_in_itself(root: Path):
    page = Page()
    page.feed((root / "report.html").read_text())
    assert "svg" in page.tags
    assert "script" not in page.tags
    # the curves refer to their own markers, and nothing to anything outside
    assert all(link.startswith("#") for link in page.links)
    cells = {
        c for row in markdown_rows((root / "report.md").read_text(), "Cost") for c in row.values()
    }
    assert cells <= set(page.text["td"])


def test_report_says_what_was_run(root: Path, tiny_recipe: Recipe):
    text = (root / "report.md").read_text()
    start = read_metrics(root / "metrics.jsonl")[0]
    assert start["environment"]["versions"]["torch"] in text
    assert start["data"]["tokens"]["code, train, context 24"]["sha256"] in text
    assert "varlen_attention" in text
    assert "stack(factor=2)" in text
    assert load_recipe(root / "recipe.yaml") == tiny_recipe
    assert tiny_recipe.to_yaml().strip() in text


def test_curves_are_an_image_and_always_the_same_bytes(root: Path, tiny_recipe: Recipe):
    before = (root / "curves.svg").read_bytes()
    assert ElementTree.fromstring(before).tag.endswith("svg")
    train(tiny_recipe, output=root, resume=True, compare="scratch")
    assert (root / "curves.svg").read_bytes() == before


def test_arm_from_scratch_is_the_same_architecture_for_the_same_work(
    root: Path, tiny_recipe: Recipe
):
    records, scratch = (
        read_metrics(path) for path in (root / "metrics.jsonl", root / "scratch" / "metrics.jsonl")
    )
    grown, alone = summarise(records), summarise(scratch)
    assert alone[0].parameters == grown[1].parameters
    budget = grown[0].flops + grown[1].flops
    # in whole steps
    assert abs(alone[0].flops - budget) <= alone[0].flops / alone[0].steps
    recipe = scratch_recipe(tiny_recipe, records)
    assert recipe.stages[0].data == {"prose": 1.0}
    assert recipe.stages[0].schedule.peak == tiny_recipe.stages[0].schedule.peak
    # evaluated at every one of its few steps, and after the last
    evals = [r for r in scratch if r["kind"] == "eval"]
    assert [r["when"] for r in evals] == ["before", *["during"] * (len(evals) - 2), "after"]
    assert len(evals) == alone[0].steps + 1
    rows = markdown_rows((root / "report.md").read_text(), "Growth against scratch")
    assert rows[0]["loss"] == f"{grown[1].after['prose']:.4f}"
    assert rows[1]["loss"] == f"{alone[0].after['prose']:.4f}"
    assert rows[1]["FLOPs"] == f"{alone[0].flops:.3e}"


@pytest.mark.parametrize(
    ("scratch", "reached", "text"),
    [
        pytest.param(
            [(0, 9.0), (50, 4.0), (100, 3.0)], 100, "(0.50 of the grown)", id="at-the-end"
        ),
        pytest.param([(0, 9.0), (50, 2.9), (100, 3.1)], 50, "(0.25 of the grown)", id="the-first"),
        pytest.param([(0, 9.0), (50, 4.0)], None, "not reached within 5.000e+01", id="never"),
    ],
)
def test_work_to_reach_the_grown_loss(
    scratch: list[tuple[int, float]], reached: int | None, text: str
):
    comparison = Comparison("grow", [(0, 9.0), (200, 3.0)], scratch)
    assert comparison.reached == reached
    assert comparison.table().rows[2][2].endswith(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"grow": None}, "needs a stage that grows", id="nothing-grows"),
        pytest.param({"evaluate": ["code"]}, r"name \['prose'\]", id="loss-not-evaluated"),
    ],
)
def test_what_cannot_be_compared(
    make_recipe: Callable[..., Recipe], tmp_path: Path, change: dict[str, Any], message: str
):
    stages = make_recipe().resolved()["stages"]
    stages[1]["model"]["grow"] = change.get("grow", stages[1]["model"]["grow"])
    stages[1]["evaluate"] = change.get("evaluate")
    with pytest.raises(ValueError, match=message):
        train(make_recipe(stages=stages), output=tmp_path / "run", compare="scratch")
    assert not (tmp_path / "run").exists()
