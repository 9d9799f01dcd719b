"""How much memory and time does growing a checkpoint on disk take, against `cp` of its result?

`python bench/grow_streaming.py [--layers 32] [--folder DIR]` writes a checkpoint of bfloat16 in the
shape of a 7B Llama, filled with random bytes (no holes, which would be read for free), grows it in
depth and in width, copies each result with `cp`, and writes memory and times to bench/results/.
Files are dropped from the page cache before each run; every time ends when the disk has the data.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import machine
import torch

RESULTS = Path(__file__).parent / "results"
WIDTH, FEED_FORWARD, VOCABULARY = 4096, 11008, 32000
FILE_BYTES = 5_000_000_000
_BLOCK = 1 << 26

# a process of its own, whose high-water mark is that of the growth
_GROW = """
import sys, time
from pathlib import Path
import apical
from apical.growth.operators import Stack, Widen
from apical.growth.shards import grow_checkpoint
import transformers
start = time.perf_counter()
grow_checkpoint(sys.argv[1], sys.argv[2], eval(sys.argv[3]), max_shard_bytes=int(sys.argv[4]))
seconds = time.perf_counter() - start
status = Path("/proc/self/status").read_text().splitlines()
print(seconds, next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def config(layers: int) -> dict[str, Any]:
    """Return the config of a 7B Llama, or of its first layers."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def write_source(folder: Path, layers: int) -> int:
    """Write the checkpoint in files of 5 GB, full of random bytes; return its size."""
    from apical.growth.checkpoint_output import as_json, write_checkpoint
    from apical.growth.spaces import architecture_of
    from apical.growth.tensor_file import Form

    values = config(layers)
    table = architecture_of(values)
    sizes = table.sizes(values)
    forms = {
        name: Form(weight.shape(sizes), torch.bfloat16)
        for name, weight in table.weights(values).items()
    }
    random = torch.frombuffer(bytearray(os.urandom(_BLOCK)), dtype=torch.bfloat16)

    def tensor(name: str) -> torch.Tensor:
        form = forms[name]
        count = form.nbytes // 2
        return random.repeat(-(-count // random.numel()))[:count].view(form.shape)

    (folder / "empty").mkdir()
    write_checkpoint(
        folder / "source", forms, tensor, texts={"config.json": as_json(values)},
        beside=folder / "empty", same="", what="the source", max_shard_bytes=FILE_BYTES,
        progress=None,
    )  # fmt: skip
    return sum(form.nbytes for form in forms.values())


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache, so that they are read from the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def grow(source: Path, out: Path, operator: str) -> dict[str, Any]:
    """Grow a checkpoint in a process of its own; return seconds and peak memory in bytes."""
    forget(source)
    command = [sys.executable, "-c", _GROW, str(source), str(out), operator, str(FILE_BYTES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = done.stdout.split()
    return {"seconds": float(seconds), "peak": int(peak) * 1024}


def copy(out: Path, copied: Path) -> dict[str, Any]:
    """Copy a directory with cp; return seconds until it ends, and until the disk has the data."""
    forget(out)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", out, copied], check=True)
    ended = time.perf_counter() - start
    subprocess.run(["sync", *copied.iterdir()], check=True)
    return {"cp": ended, "cp_and_sync": time.perf_counter() - start}


def race(folder: Path, operator: str, tell: Callable[[str], object]) -> dict[str, Any]:
    """Grow, copy the result, and remove both."""
    out, copied = folder / "grown", folder / "copied"
    row = {"operator": operator} | grow(folder / "source", out, operator)
    row["bytes"] = sum(path.stat().st_size for path in out.iterdir())
    row |= copy(out, copied)
    shutil.rmtree(copied)
    shutil.rmtree(out)
    tell(str(row))
    return row


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the Markdown table of the runs."""
    lines = [
        "| source | operator | written | time | peak memory | `cp` | `cp` and `sync` "
        "| speed of `cp` | of `cp` and `sync` |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['layers']} layers, {row['source_bytes'] / 1e9:.1f} GB | `{row['operator']}` "
        f"| {row['bytes'] / 1e9:.1f} GB | {row['seconds']:.1f} s "
        f"| {row['peak'] / 1e9:.2f} GB | {row['cp']:.1f} s | {row['cp_and_sync']:.1f} s "
        f"| {row['cp'] / row['seconds']:.2f} × | {row['cp_and_sync'] / row['seconds']:.2f} × |"
        for row in rows
    ]
    return lines


def write(path: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write every run as JSON, and the table."""
    peer = "installed, not raced" if importlib.util.find_spec("mergekit") else "not installed"
    data = facts | {"mergekit": peer, "runs": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    command = "".join(f" --layers {row['layers']}" for row in rows[:1])
    command += "".join(f" --width-layers {row['layers']}" for row in rows[1:])
    lines = [
        "# Growing a checkpoint on disk",
        "",
        f"Layers in the shape of the 7B Llama (hidden {WIDTH}, feed-forward {FEED_FORWARD}, "
        f"vocabulary {VOCABULARY}), bfloat16, random bytes without holes, not in the "
        f"page cache. Time: until the disk has the data. Memory: the whole process, PyTorch and "
        f"transformers included. The last columns: time of `cp` of the same result, by ours. "
        f"mergekit: {peer}.",
        "",
        *table(rows),
        "",
        f"{facts['device']}, one thread, torch {facts['versions']['torch']}, {facts['date']}, "
        f"commit {facts['commit'][:12]}, load {facts['load_start']}; "
        f"`python bench/grow_streaming.py{command}`.",
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the source, race the operators, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--width-layers", type=int, default=4, help="layers for the wider model")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    facts = machine.facts("cpu", 1)
    runs = [
        (options.layers, f"Stack(layers={options.layers + options.layers // 2})"),
        # arithmetic on every weight: as fast for few layers as for many
        (options.width_layers, f"Widen(ffn={FEED_FORWARD * 5 // 4})"),
    ]
    rows = []
    for layers, operator in runs:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            size = write_source(Path(name), layers)
            row = race(Path(name), operator, lambda text: print(text, flush=True))
            rows.append(row | {"layers": layers, "source_bytes": size})
    write(options.output / f"grow_streaming-{machine.slug(facts)}-{facts['date']}", facts, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
