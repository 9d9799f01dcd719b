"""The curves of a run as one SVG, the same bytes for the same records."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .summary import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..compare import Comparison

# 900 px at the 72 points an inch of SVG and the 96 pixels of a browser
_WIDTH, _PANEL = 9.375, 3.4
# what lies between two evaluations is not known
_EVALUATED = "nats per token, at the points"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "apical",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def draw_curves(records: Sequence[Record], comparison: "Comparison | None" = None) -> str:
    """Return training and held-out losses against tokens, and against FLOPs where compared."""
    with mpl.rc_context(_STYLE):
        panels = 3 if comparison else 2
        # no pyplot: a figure of its own needs no display and leaves no global state
        figure = Figure(figsize=(_WIDTH, _PANEL * panels), layout="constrained")
        axes = figure.subplots(panels, squeeze=False)[:, 0]
        axes[0].sharex(axes[1])
        _draw_training(axes[0], records)
        _draw_held_out(axes[1], records)
        if comparison:
            _draw_comparison(axes[2], comparison)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _draw_training(axis: "Axes", records: Sequence[Record]) -> None:
    for stage in _stages(records):
        points = [r for r in records if r["kind"] == "train" and r["stage"] == stage]
        axis.plot(*_points(points, "tokens", "loss"), label=stage, linewidth=1.2)
    axis.set(title="Training loss", xlabel="tokens", ylabel="nats per token")
    _mark_stages(axis, records)


def _draw_held_out(axis: "Axes", records: Sequence[Record]) -> None:
    evals = [r for r in records if r["kind"] == "eval"]
    for key in sorted({k for r in evals for k in r if k.startswith("loss/")}):
        own = [r for r in evals if key in r]
        axis.plot(*_points(own, "tokens", key), "o:", label=key.split("/", 1)[1], markersize=4)
    axis.set(title="Held-out loss, by domain", xlabel="tokens", ylabel=_EVALUATED)
    _mark_stages(axis, records)


def _draw_comparison(axis: "Axes", comparison: "Comparison") -> None:
    for label, arm in (("grown", comparison.grown), ("from scratch", comparison.scratch)):
        axis.plot([flops for flops, _ in arm], [loss for _, loss in arm], "o:", ms=4, label=label)
    axis.axhline(comparison.target, color="0.5", linestyle=":", linewidth=1)
    axis.set(
        title=f"Held-out loss on the mixture of stage {comparison.stage}, for equal work",
        xlabel="training FLOPs",
        ylabel=_EVALUATED,
    )
    axis.legend(frameon=False)


def _mark_stages(axis: "Axes", records: Sequence[Record]) -> None:
    # room for the names
    axis.margins(y=0.12)
    starts = [r for r in records if r["kind"] == "eval" and r["when"] == "before"]
    for start in starts:
        axis.axvline(start["tokens"], color="0.6", linestyle="--", linewidth=0.8)
        axis.annotate(
            start["stage"],
            (start["tokens"], 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -10),
            textcoords="offset points",
            color="0.4",
            fontsize=8,
        )
    axis.legend(frameon=False)


def _stages(records: Sequence[Record]) -> list[str]:
    return [r["stage"] for r in records if r["kind"] == "stage"]


def _points(records: Sequence[Record], x: str, y: str) -> tuple[list[Any], list[Any]]:
    return [r[x] for r in records], [r[y] for r in records]
