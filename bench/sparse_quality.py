"""Does the support matter? One small Llama per kind of weight and seed, trained on the same text.

`python bench/sparse_quality.py [--seeds 3] [--tokens N] [--peaks LR ...]` trains every kind with
every seed and learning rate through the recipe's own trainer and writes the held-out losses, with
their spread and the differences between kinds that saw the same data, to bench/results/.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import machine

RESULTS = Path(__file__).parent / "results"
WIDTH, FEED_FORWARD, LAYERS = 256, 704, 4
RANK, DENSITY, BASE = 0.25, 1 / 32, "uniform"


def kinds() -> dict[str, dict[str, Any] | None]:
    """Return what each kind puts in a recipe's `sparsity`; all but the first two are as large."""
    found: dict[str, dict[str, Any] | None] = {"full rank": None}
    found["low rank"] = {"low_rank": {"rank": _equal_rank(), "init": "cola"}}
    for support in ("uniform", "regular", "grouped"):
        options = {"rank": RANK, "density": DENSITY, "support": support, "init": "sltrain"}
        found[support] = {"sparse_low_rank": options | {"alpha": 32.0}}
    return found


def _equal_rank() -> float:
    """Return the share of the width at which factors alone are as large as factors and entries."""
    shapes = [(WIDTH, WIDTH)] * 4 + [(WIDTH, FEED_FORWARD)] * 3
    factors = sum(n + m for n, m in shapes)
    entries = DENSITY * sum(n * m for n, m in shapes)
    return round(RANK * WIDTH + entries / factors) / WIDTH


def recipe(sparsity: dict[str, Any] | None, *, seed: int, tokens: int, peak: float) -> dict:
    """Return the recipe of one run."""
    model = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    stage = {
        "name": "train",
        "model": {"from": "scratch", "config": model},
        "data": {"prose": 1.0},
        "tokens": tokens,
        "batch_tokens": 2048,
        "context": 256,
        "sparsity": sparsity,
        "schedule": {"kind": "cosine", "peak": peak, "warmup": 0.1, "min_ratio": 0.1},
        "optimizer": {"weight_decay": 0.0},
        "evaluate_tokens": 65536,
    }
    return {
        "name": "quality",
        "seed": seed,
        "tokenizer": {"train_on": ["prose"], "vocab_size": 4096},
        "sources": {"prose": {"corpus": "prose", "max_bytes": 4000000}},
        "checkpoint_every": 10**6,
        "threads": 1,
        "stages": [stage],
    }


def run_one(name: str, data: dict, seed: int, peak: float) -> dict[str, Any]:
    """Train one model; return its held-out loss and what it has."""
    from apical.growth.train.recipe.schema import Recipe
    from apical.growth.train.results.metrics import read_metrics
    from apical.growth.train.run import train

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        root = train(Recipe.model_validate(data), output=Path(folder) / "run")
        records = read_metrics(root / "metrics.jsonl")
    last = [record for record in records if record["kind"] == "eval"][-1]
    parameters = next(record["parameters"] for record in records if record["kind"] == "stage")
    return {
        "kind": name,
        "seed": seed,
        "peak": peak,
        "loss": last["loss/prose"],
        "parameters": parameters,
        "flops": last["flops"],
        "seconds": time.perf_counter() - start,
    }


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Return the Markdown table of the runs."""
    lines = [
        "| learning rate | weights | parameters | FLOPs | held-out loss, nats per token "
        f"| of each seed | minus {BASE}, same seed | its standard error |",
        "| ---: | --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    base = {(run["peak"], run["seed"]): run["loss"] for run in runs if run["kind"] == BASE}
    for peak, name in dict.fromkeys((run["peak"], run["kind"]) for run in runs):
        mine = [run for run in runs if (run["peak"], run["kind"]) == (peak, name)]
        losses = [run["loss"] for run in mine]
        apart = [run["loss"] - base[peak, run["seed"]] for run in mine]
        error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
        lines.append(
            f"| {peak:g} | {name} | {mine[0]['parameters'] / 1e6:.2f} M | {mine[0]['flops']:.2e} "
            f"| {statistics.mean(losses):.4f} | {', '.join(f'{loss:.3f}' for loss in losses)} "
            f"| {statistics.mean(apart):+.4f} | {error:.4f} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Train everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--peaks", type=float, nargs="+", default=[3e-3, 1e-3])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    jobs = [
        (name, recipe(sparsity, seed=seed, tokens=options.tokens, peak=peak), seed, peak)
        for peak in options.peaks
        for seed in range(options.seeds)
        for name, sparsity in kinds().items()
    ]
    facts = machine.facts("cpu", 1)
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        runs = list(pool.map(run_one, *zip(*jobs, strict=True)))
    write(options.output / f"sparse_quality-{machine.slug(facts)}-{facts['date']}", facts, runs,
          options)  # fmt: skip
    return 0


def write(
    path: Path, facts: dict[str, Any], runs: list[dict[str, Any]], options: argparse.Namespace
) -> None:
    """Write every run as JSON, and the table."""
    data = facts | {"tokens": options.tokens, "runs": runs}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Loss of a small Llama by the kind of its weights",
        "",
        f"{LAYERS} layers of width {WIDTH} (feed-forward {FEED_FORWARD}), vocabulary 4096, English "
        f"prose, {options.tokens / 1e6:g} M tokens, AdamW, {options.seeds} "
        f"seeds (weights and data order; the same data for every kind). Rank {RANK:g} of the "
        f"width, density {DENSITY:g}; low rank has as many parameters.",
        "",
        *table(runs),
        "",
        f"{facts['device']}, torch {facts['versions']['torch']}, {facts['date']}, commit "
        f"{facts['commit'][:12]}; `python bench/sparse_quality.py --seeds {options.seeds} "
        f"--tokens {options.tokens} --peaks {' '.join(f'{peak:g}' for peak in options.peaks)}`.",
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
