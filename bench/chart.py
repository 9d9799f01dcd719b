"""The picture of a report: one panel per case, one bar per provider."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from report import note

_OURS, _SLOWER, _FASTER, _LIMIT, _WRONG = "#1b6e53", "#8fa8b8", "#dd9a4b", "#d8d8cf", "#c0503f"
_INK, _FAINT = "#22302c", "#7b8784"
_COLUMNS = 2
_BAR_HEIGHT = 0.27  # inches


def draw(data: dict, path: Path) -> None:
    """Write the ratios of a report as a bar chart; the suffix chooses the format."""
    # text stays text in the svg, and the same data gives the same file
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": data["op"]}):
        figure = _figure(data)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, facecolor="white", dpi=110)


def _figure(data: dict) -> Figure:
    cases = data["cases"]
    columns = min(_COLUMNS, len(cases))
    rows = -(-len(cases) // columns)
    bars = max(len(case["providers"]) for case in cases)
    height = rows * (bars * _BAR_HEIGHT + 0.85) + 0.9
    figure = Figure(figsize=(7.2 * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, case in zip(axes, cases, strict=False):
        _panel(axis, case)
    for axis in axes[len(cases) :]:
        axis.set_axis_off()
    _caption(figure, data)
    return figure


def _caption(figure: Figure, data: dict) -> None:
    quick = ", quick run: not a measurement" if data["quick"] else ""
    threads = f"{data['threads']} thread{'s' if data['threads'] > 1 else ''}"
    figure.suptitle(
        f"{data['op']}: time of each provider / time of ours (right of the line, ours is faster)\n"
        f"{data['device']}, {threads}, torch {data['versions']['torch']}, "
        f"{data['date']}, commit {data['commit'][:12]}{'+' if data['dirty'] else ''}{quick}",
        fontsize=11,
        color=_INK,
    )


def _panel(axis: Axes, case: dict) -> None:
    providers = case["providers"]
    ratios = [p["ratio"] for p in providers if p["ratio"]]
    axis.set_xscale("log")
    # room on the right for the labels
    right = max(4.0, max(ratio["q3"] for ratio in ratios) * 4)
    axis.set_xlim(min(0.5, min(ratio["q1"] for ratio in ratios) / 1.3), right)
    for i, provider in enumerate(providers):
        _bar(axis, i, provider)
    axis.axvline(1, color=_INK, linewidth=0.8, zorder=3)
    axis.set_yticks(range(len(providers)), [p["name"] for p in providers])
    axis.set_ylim(len(providers) - 0.4, -0.6)
    axis.set_title(case["name"], loc="left", fontsize=10, fontweight="bold", color=_INK)
    _tidy(axis)


def _bar(axis: Axes, i: int, provider: dict) -> None:
    if provider["status"] == "not run":
        _label(axis, 1.0, i, _short(note(provider)), _FAINT)
        return
    ratio = provider["ratio"]
    median = ratio["median"]
    if provider["name"] == "ours":
        axis.plot(1, i, "o", color=_OURS, markersize=7, zorder=5)
    axis.barh(i, median - 1, left=1, height=0.62, color=_colour(provider), zorder=2)
    if ratio["q3"] > ratio["q1"]:
        axis.plot([ratio["q1"], ratio["q3"]], [i, i], color=_INK, linewidth=1.2, zorder=4)
    words = [f"{median:.2f}×" if median < 10 else f"{median:.0f}×"]
    words.append(_time(provider["seconds"]["median"]))
    if provider["peak_bytes"] is not None:
        words.append(f"{provider['peak_bytes'] / 1e6:.0f} MB")
    words += [note(provider).replace("**", "")] if note(provider) else []
    end = max(median, ratio["q3"], 1.0)
    _label(axis, end, i, "  ".join(words), _INK)


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _label(axis: Axes, end: float, i: int, text: str, colour: str) -> None:
    place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    axis.annotate(text, (end, i), fontsize=7.5, color=colour, **place)


def _colour(provider: dict) -> str:
    if provider["status"] == "wrong":
        return _WRONG
    if provider["limit"]:
        return _LIMIT
    return _SLOWER if provider["ratio"]["median"] >= 1 else _FASTER


def _short(text: str) -> str:
    return text if len(text) <= 64 else text[:63] + "…"


def _tidy(axis: Axes) -> None:
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=_INK)
    axis.tick_params(axis="x", which="both", labelsize=8, color=_FAINT, labelcolor=_FAINT)
    axis.grid(axis="x", color="#e4e9e7", linewidth=0.7, zorder=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#c9d1ce")
