"""Results as JSON, and that JSON as Markdown and SVG.

`python bench/report.py FILE.json` draws a file again, for instance one from a machine that has
torch alone.
"""

import json
import logging
import sys
from pathlib import Path

from race import Entrant, Result, quartiles

log = logging.getLogger(__name__)


def summary(op: str, results: list[Result], facts: dict, peaks: dict[str, float]) -> dict:
    """Return everything that is known of one op's races, ready for JSON."""
    cases = [_case(result, peaks) for result in results]
    return {"op": op, **facts, "peaks": peaks, "cases": cases}


def _case(result: Result, peaks: dict[str, float]) -> dict:
    lineup = result.lineup
    return {
        "name": result.name,
        "what": lineup.what,
        "dtype": lineup.dtype,
        "tolerance": lineup.tolerance,
        "flops": lineup.flops,
        "bytes": lineup.bytes,
        "providers": [_provider(entrant, result, peaks) for entrant in result.entrants],
    }


def _provider(entrant: Entrant, result: Result, peaks: dict[str, float]) -> dict:
    lineup = result.lineup
    return {
        "name": entrant.name,
        "status": entrant.status,
        "reason": entrant.reason,
        "limit": entrant.limit,
        "error": entrant.error,
        "peak_bytes": entrant.peak_bytes,
        "seconds": _spread(entrant.seconds),
        "ratio": _spread(entrant.ratios),
        **_rates(entrant, lineup.flops, lineup.bytes, gemm_peak(lineup.dtype, peaks), peaks),
    }


def gemm_peak(dtype: str, peaks: dict[str, float]) -> float:
    """Return the fastest way to multiply matrices of that dtype: 16-bit ones may be widened."""
    return max(peaks[dtype], peaks["float32"]) if dtype in peaks else peaks["float32"]


def _rates(
    entrant: Entrant, flops: float | None, moved: float | None, gemm: float, peaks: dict
) -> dict[str, float | None]:
    """Return useful work per second, and its share of the ceiling that is nearer."""
    if not entrant.seconds:
        return {"tflops": None, "gbps": None, "share": None}
    median = quartiles(entrant.seconds)[1]
    tflops = flops / median / 1e12 if flops else None
    gbps = moved / median / 1e9 if moved else None
    shares = [(tflops or 0.0) / gemm, (gbps or 0.0) / peaks["copy_gb"]]
    return {"tflops": tflops, "gbps": gbps, "share": max(shares) or None}


def _spread(values: list[float]) -> dict | None:
    if not values:
        return None
    low, median, high = quartiles(values)
    return {"median": median, "q1": low, "q3": high, "count": len(values), "all": values}


def lines(result: Result) -> list[str]:
    """Return one line per provider, for the terminal."""
    return [_terminal(entrant) for entrant in result.entrants]


def _terminal(entrant: Entrant) -> str:
    if entrant.status == "not run":
        return f"{entrant.name:36} not run: {entrant.reason}"
    seconds, ratio = quartiles(entrant.seconds)[1], quartiles(entrant.ratios)[1]
    wrong = f"  wrong by {entrant.error:.1g}" if entrant.status == "wrong" else ""
    return f"{entrant.name:36} {seconds * 1e3:10.2f} ms  {ratio:6.2f}x{wrong}"


def write(data: dict, stem: Path) -> list[Path]:
    """Write JSON, Markdown and, where matplotlib is, SVG beside each other; return the files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    # names of devices hold dots: with_suffix would cut them
    written = [stem.parent / f"{stem.name}{suffix}" for suffix in (".json", ".md", ".svg")]
    written[0].write_text(json.dumps(data, indent=1) + "\n")
    written[1].write_text(markdown(data))
    try:
        from chart import draw
    except ModuleNotFoundError as error:
        log.warning(f"no picture: {error.name} is missing; draw it with bench/report.py elsewhere")
        return written[:2]
    draw(data, written[2])
    return written


def markdown(data: dict) -> str:
    """Return the report as Markdown."""
    lines = [f"# {data['op']} on {data['device']}", "", *_facts(data), ""]
    for case in data["cases"]:
        lines += [f"## {case['name']}", "", case["what"], "", *_table(case), ""]
    return "\n".join(lines).rstrip() + "\n"


def _facts(data: dict) -> list[str]:
    peaks = data["peaks"]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    dirty = " with uncommitted changes" if data["dirty"] else ""
    quick = ["**A quick run: small shapes, to see that everything works. Not a measurement.**", ""]
    return [
        *(quick if data["quick"] else []),
        f"{data['date']}, commit {data['commit'][:12]}{dirty}; {versions}; C++ extension: "
        f"{data['extension']}.",
        f"{data['cpu']} ({', '.join(data['isa'])}), {data['threads']} of {data['cores']} cores, "
        f"load average {data['load_start']} before and {data['load_end']} after.",
        f"Measured ceilings: {peaks['float32']:.3g} TFLOP/s float32, {peaks['bfloat16']:.3g} "
        f"TFLOP/s bfloat16, copy {peaks['copy_gb']:.3g} GB/s.",
        "",
        "Ratio: a provider's time / ours, in the same round; median (quartiles). Above 1, ours is "
        "faster.",
    ]


def _table(case: dict) -> list[str]:
    rate = "TFLOP/s" if case["flops"] else "GB/s"
    head = ["provider", "ratio", "time, ms", rate, "of peak", "peak memory, MB", "error", "note"]
    rows = [_row(provider) for provider in case["providers"]]
    return [_line(head), _line(["---"] + ["---:"] * 6 + ["---"]), *map(_line, rows)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _row(p: dict) -> list[str]:
    name = f"**{p['name']}**" if p["name"] == "ours" else p["name"]
    if p["status"] == "not run":
        return [name, *["–"] * 6, note(p)]
    ratio = "1" if p["name"] == "ours" else _quartiles(p["ratio"])
    rate = p["gbps"] if p["tflops"] is None else p["tflops"]
    share = "–" if p["share"] is None else f"{p['share']:.0%}"
    memory = "–" if p["peak_bytes"] is None else f"{p['peak_bytes'] / 1e6:.0f}"
    error = "–" if p["error"] is None else f"{p['error']:.1g}"
    times = _quartiles(p["seconds"], scale=1e3)
    return [name, ratio, times, _number(rate), share, memory, error, note(p)]


def note(p: dict) -> str:
    """Return in a few words what a reader must know beside the numbers."""
    if p["status"] == "not run":
        return f"not run: {p['reason']}"
    notes = ["**wrong result**"] if p["status"] == "wrong" else []
    notes += ["a limit, not a competitor"] if p["limit"] else []
    notes += ["called once"] if p["seconds"]["count"] == 1 else []
    return "; ".join(notes)


def _quartiles(spread: dict, *, scale: float = 1.0) -> str:
    low, median, high = (_number(spread[key] * scale) for key in ("q1", "median", "q3"))
    return median if spread["count"] == 1 else f"{median} ({low}–{high})"


def _number(value: float | None) -> str:
    """Return three digits, never in powers of ten."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-3 else f"{value:.1g}"


def _draw_again(path: Path) -> None:
    write(json.loads(path.read_text()), path.with_name(path.name.removesuffix(".json")))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        _draw_again(Path(argument))
