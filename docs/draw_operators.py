"""Draw a picture of every growth operator from its own plan: `python docs/draw_operators.py`.

One SVG each in docs/pictures/, or in the folder given (with a second argument, `png`, to look at).
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from transformers import LlamaConfig

from apical.growth.maps import LinearMap
from apical.growth.operators import OPERATORS
from apical.growth.plan import GrowthPlan

# options that show what an operator does on a model this small, where its defaults do not
EXAMPLES: dict[str, dict[str, Any]] = {}
# further pictures of an operator: file name -> operator and options
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "widen-zero": ("widen", {"hidden": 6, "new": "zero"}),
}
_DEPTH = 4


def small_model() -> dict[str, Any]:
    """Return the config of the model that the pictures show."""
    return LlamaConfig(
        num_hidden_layers=_DEPTH,
        hidden_size=4,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=2,
        vocab_size=8,
    ).to_dict()


# one colour per old layer or direction; dark ink reads well on all of them
_PALETTE = ("#7fb3e6", "#f2b36b", "#8fd19e", "#e49ac0", "#c3b1e8", "#d9d36c", "#8ad1d1", "#e59a8c")
# readable on white and on black
_GREY, _INK, _RANDOM = "#7d8590", "#1c2128", "#c9ced6"
_BOX, _STEP, _CELL, _ROW, _LINE, _LEFT = 0.36, 0.46, 0.27, 1.05, 0.2, 0.4  # inches
_MARGIN = 0.04
_WORDS = {0.5: "½", 0.25: "¼", 0.75: "¾", 0.125: "⅛"}


def draw(plan: GrowthPlan, name: str, path: Path) -> None:
    """Write the picture of a plan; the suffix of `path` chooses the format."""
    depth = any(s.zero or s.terms != ((i, 1.0),) for i, s in enumerate(plan.layers))
    # one unit is an inch
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    bottom, width = _heading(axes, plan, name), 3.4
    if depth:
        bottom, width = _draw_depth(axes, plan, bottom), max(width, _depth_width(plan))
    if plan.spaces:
        bottom, right = _draw_map(axes, plan, bottom)
        width = max(width, right)
    figure.set_size_inches(width, -bottom)
    axes.set(xlim=(0, width), ylim=(bottom, 0))
    # text stays text in the svg, and the same plan gives the same file
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "hatch.linewidth": 0.6}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        look = {"transparent": True, "dpi": 130}
        figure.savefig(path, metadata=metadata, **look)


def _heading(axes: Axes, plan: GrowthPlan, name: str) -> float:
    kept = "function kept" if plan.preserves_function else "function changes"
    look = {"color": _GREY, "fontsize": 9, "fontweight": "bold", "va": "top"}
    axes.text(0, -0.04, f"{name}: {kept}", **look)
    return -_LINE - 0.08


def _depth_width(plan: GrowthPlan) -> float:
    return max(len(plan.layers), _DEPTH) * _STEP + _LEFT


def _draw_depth(axes: Axes, plan: GrowthPlan, top: float) -> float:
    counts = {"old": _DEPTH, "new": len(plan.layers)}
    widest = max(counts.values())
    left = {row: _LEFT + (widest - count) * _STEP / 2 for row, count in counts.items()}
    high, low = top - _BOX, top - _ROW
    for row, y in (("old", high), ("new", low)):
        axes.text(0, y + _BOX / 2, row, color=_GREY, fontsize=7.5, va="center")
    for i in range(counts["old"]):
        _box(axes, left["old"] + i * _STEP, high, _PALETTE[i], str(i))
    for i, source in enumerate(plan.layers):
        x = left["new"] + i * _STEP
        terms = () if source.random else source.terms
        for layer, weight in terms:
            start = (left["old"] + layer * _STEP + _BOX / 2, high)
            _arrow(axes, start, (x + _BOX / 2, low + _BOX), _PALETTE[layer], abs(weight))
        _box(axes, x, low, _blend(terms), _label(terms), hatched=bool(source.zero))
    if any(source.zero for source in plan.layers):
        words = "hatched: adds 0 at first"
        axes.text(_LEFT, low - 0.06, words, color=_GREY, fontsize=7, va="top")
    return low - 1.5 * _LINE


def _label(terms: tuple[tuple[int, float], ...]) -> str:
    kept = sorted(term for term in terms if abs(term[1]) > 1e-9)
    if len(kept) > 2:
        return "Σ"
    signed = "".join(f"{'+' if weight > 0 else '−'}{layer}" for layer, weight in kept)
    return signed.removeprefix("+") or "new"


def _blend(terms: tuple[tuple[int, float], ...]) -> str:
    if not terms:
        return _RANDOM
    total = sum(abs(weight) for _, weight in terms)
    shares = [(colors.to_rgb(_PALETTE[layer]), abs(weight) / total) for layer, weight in terms]
    red, green, blue = (sum(rgb[i] * share for rgb, share in shares) for i in range(3))
    return colors.to_hex((red, green, blue))


def _box(axes: Axes, x: float, y: float, colour: str, text: str, *, hatched: bool = False) -> None:
    style = "round,pad=0,rounding_size=0.06"
    box = FancyBboxPatch((x, y), _BOX, _BOX, boxstyle=style, facecolor=colour, edgecolor=_GREY)
    box.set(linewidth=0.8, hatch="////" if hatched else None, zorder=3)
    axes.add_patch(box)
    place = {"ha": "center", "va": "center", "fontsize": 8, "color": _INK, "zorder": 4}
    pad = {"facecolor": colour, "edgecolor": "none", "pad": 0.8} if hatched else None
    axes.text(x + _BOX / 2, y + _BOX / 2, text, bbox=pad, **place)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, weight: float
) -> None:
    if weight < 1e-9:
        return
    look = {"arrowstyle": "-|>", "mutation_scale": 7, "shrinkA": 0, "shrinkB": 1, "color": colour}
    width = 0.5 + 0.9 * min(weight, 1.0)
    axes.add_patch(FancyArrowPatch(start, end, linewidth=width, zorder=2, **look))


def _draw_map(axes: Axes, plan: GrowthPlan, top: float) -> tuple[float, float]:
    """Return how low and how far right it goes."""
    # one space says how all are mapped
    space = "hidden" if "hidden" in plan.spaces else next(iter(plan.spaces))
    found = plan.spaces[space]
    words = f"{space}: {found.old} → {found.new} directions"
    axes.text(0, top, words, color=_GREY, fontsize=7.5, va="top")
    top -= 2 * _LINE
    random = plan.fill is not None and plan.fill.std > 0
    right = _LEFT + found.old * _CELL + 0.5
    for x, matrix, title in ((_LEFT, found.carries, "carries"), (right, found.reads, "reads")):
        axes.text(x, top + 0.05, title, color=_GREY, fontsize=7.5, va="bottom")
        _draw_matrix(axes, x, top, matrix, "random" if random and title == "reads" else "0")
    # rows that the next layer gives
    for row in [] if found.ahead is None else found.ahead.nonzero()[:, 0].tolist():
        place = {"color": _GREY, "fontsize": 6.5, "ha": "right", "va": "center"}
        axes.text(_LEFT - 0.05, top - (row + 0.5) * _CELL, "next", **place)
    return top - found.new * _CELL - _MARGIN, right + found.old * _CELL + _MARGIN


def _draw_matrix(axes: Axes, x: float, top: float, matrix: LinearMap, empty: str) -> None:
    for row, values in enumerate(matrix.matrix().tolist()):
        y = top - (row + 1) * _CELL
        if not any(values):
            _cell(axes, x, y, "none", empty, cells=matrix.old)
            continue
        for column, value in enumerate(values):
            colour, text = (_PALETTE[column], _number(value)) if value else ("none", "")
            _cell(axes, x + column * _CELL, y, colour, text)


def _cell(axes: Axes, x: float, y: float, colour: str, text: str, *, cells: int = 1) -> None:
    width = cells * _CELL
    look = {"facecolor": colour, "edgecolor": _GREY, "linewidth": 0.4}
    axes.add_patch(Rectangle((x, y), width, _CELL, **look))
    ink = _GREY if colour == "none" else _INK
    place = {"ha": "center", "va": "center", "fontsize": 7, "color": ink}
    axes.text(x + width / 2, y + _CELL / 2, text, **place)


def _number(value: float) -> str:
    sign = "−" if value < 0 else ""
    return sign + _WORDS.get(abs(value), f"{abs(value):.2g}".removeprefix("0"))


def plans() -> dict[str, GrowthPlan]:
    """Return the plan to draw of every picture: its file's name -> the plan."""
    config = small_model()
    wanted = {name: (name, EXAMPLES.get(name, {})) for name in OPERATORS} | VARIANTS
    return {
        file: OPERATORS[name](**options).plan(config) for file, (name, options) in wanted.items()
    }


def title(plan: GrowthPlan, defaults: Mapping[str, Any]) -> str:
    """Return the operator with the options that are not its defaults."""
    told = [f"{k} {v}" for k, v in plan.options.items() if k not in defaults or defaults[k] != v]
    return " ".join([plan.operator, *told])


def main(folder: str = "", suffix: str = "svg") -> None:
    """Draw all pictures."""
    out = Path(folder) if folder else Path(__file__).parent / "pictures"
    out.mkdir(parents=True, exist_ok=True)
    for file, plan in plans().items():
        kind = OPERATORS[VARIANTS[file][0] if file in VARIANTS else file]
        defaults = {name: f.default for name, f in kind.__dataclass_fields__.items()}
        path = out / f"{file}.{suffix}"
        draw(plan, title(plan, defaults), path)
        if suffix == "svg":
            _tidy(path)


def _tidy(path: Path) -> None:
    # a version of matplotlib in the metadata would change every file
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", path.read_text(), flags=re.DOTALL)
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
