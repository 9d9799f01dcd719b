"""The report of a run: Markdown, a page that needs nothing beside itself, and the curves."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from .curves import draw_curves
from .summary import Record, cost_table, loss_table, summarise
from .tables import Table

if TYPE_CHECKING:
    from ..compare import Comparison

_CSS = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
pre { background: #f6f6f6; padding: .75rem; overflow-x: auto; font-size: 13px; }
svg { max-width: 100%; height: auto; }
"""
_NOTES = (
    "Losses are on held-out text that no stage trains on, the same every time. Forgetting is the "
    "loss after minus before a stage that brings a new source, on the sources trained on earlier. "
    "FLOPs are those of the matrix products in training (see growth/train/flops.py); evaluation "
    "is not counted. The training loss includes the z-loss of a stage that has one."
)


def write_report(
    output: Path, records: Sequence[Record], recipe: str, comparison: "Comparison | None" = None
) -> None:
    """Write report.md, report.html and curves.svg of a finished run into its directory.

    Args:
        records: all records of the run.
        recipe: the resolved recipe, as YAML.
        comparison: with an arm trained from scratch, where there is one.
    """
    tables = result_tables(records, comparison)
    notes = [_NOTES, comparison.note] if comparison else [_NOTES]
    details = _details(records, recipe)
    curves = draw_curves(records, comparison)
    name = records[0]["name"]
    _write(output / "curves.svg", curves)
    _write(output / "report.md", _markdown(name, tables, notes, details))
    _write(output / "report.html", _html(name, tables, notes, details, curves))


def result_tables(records: Sequence[Record], comparison: "Comparison | None" = None) -> list[Table]:
    """Return the tables that say what a finished run came to."""
    stages = summarise(records)
    tables = [loss_table(stages), cost_table(stages)]
    return [*tables, comparison.table()] if comparison else tables


def _details(records: Sequence[Record], recipe: str) -> list[tuple[str, str]]:
    """Return titles and preformatted texts: what was run, on what, with what."""
    start = records[0]
    stages = [r for r in records if r["kind"] == "stage"]
    made = "\n\n".join(f"{r['stage']}\n{r['made']}" for r in stages)
    return [
        ("Models and kernels", made),
        ("Data", json.dumps(start["data"], indent=2)),
        ("Environment", json.dumps(start["environment"], indent=2)),
        ("Recipe", recipe.strip()),
    ]


def _markdown(
    name: str, tables: Sequence[Table], notes: Sequence[str], details: Sequence[tuple[str, str]]
) -> str:
    parts = [f"# {name}", "![curves](curves.svg)", *(t.markdown() for t in tables), *notes]
    parts += [f"## {title}\n\n```\n{text}\n```" for title, text in details]
    return "\n\n".join(parts) + "\n"


def _html(
    name: str,
    tables: Sequence[Table],
    notes: Sequence[str],
    details: Sequence[tuple[str, str]],
    curves: str,
) -> str:
    # the file's prologue is not allowed inside a page
    svg = curves[curves.index("<svg") :]
    parts = [f"<h1>{escape(name)}</h1>", *(t.html() for t in tables)]
    parts += [*(f"<p>{escape(note)}</p>" for note in notes), svg]
    parts += [f"<h2>{title}</h2>\n<pre>{escape(text)}</pre>" for title, text in details]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(name)}</title>\n<style>\n{_CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
