"""One table, written as text, Markdown or HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Table:
    """Cells are text already; the first column is of names, the others of numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        aligned = [_aligned(line, widths) for line in lines]
        return "\n".join([self.title, aligned[0], "-" * len(aligned[0]), *aligned[1:]])

    def markdown(self) -> str:
        marks = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [self.header, marks, *self.rows]
        return "\n".join([f"## {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines)])

    def html(self) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
            for row in self.rows
        )
        return (
            f"<h2>{escape(self.title)}</h2>\n<table>\n<thead><tr>{head}</tr></thead>\n"
            f"<tbody>\n{rows}</tbody>\n</table>"
        )


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = [f"{line[0]:<{widths[0]}}"]
    cells += [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)]
    return "  ".join(cells).rstrip()
