"""Merging checkpoint directories, with memory for one output file and a few tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apical._extras import require

from ..checkpoint_files import fingerprint, read_headers, read_json, with_defaults
from ..checkpoint_output import as_json, check_output, write_checkpoint
from ..source import fetched
from ..spaces import TABLES, Architecture
from ..tensor_file import Stored
from .checks import Described, check_configs, check_tensors, check_tokenizers
from .methods import Average, Method
from .soup import GreedySoup, resolve
from .sums import combine


def merge_checkpoints(
    sources: Sequence[str | Path],
    out: str | Path,
    method: Method | GreedySoup,
    *,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = False,
) -> tuple[float, ...]:
    """Merge checkpoint directories into another one; return how much of each is in it.

    `out` is a stock transformers directory with the config, dtypes, tokenizer and licence of the
    first source, a model card, and apical_merge.json, which says what was merged. It is written
    under another name beside `out` and renamed when it is whole. Sources may be split into
    different shards. A greedy soup writes each average that it tries beside `out` for a moment.

    Precision: sums in float32, or in float64 where a tensor is, rounded once.

    Args:
        sources: directories with config.json and safetensors, or names of models on the hub; of
            TaskVectors the first is the base, of EMA the last is the newest.
        out: directory to make; its parents are made too.
        method: for example `apical.Average()`.
        max_shard_bytes: size of an output file, unless one tensor alone is larger.
        progress: show a progress bar on stderr.

    Raises:
        FileExistsError: `out` exists; nothing is overwritten.
        FileNotFoundError: a source, its config or its safetensors are not there.
        ValueError: sources are of different architectures or tokenizers, or the method has numbers
            for more or fewer of them.
        OSError: the disk is full; what was written is removed.

    Source: ours; the methods name theirs.
    """
    out = Path(out)
    check_output(out, max_shard_bytes)
    if not sources:
        raise ValueError("sources is empty; expected one checkpoint directory or more")
    paths, names = zip(*(fetched(source) for source in sources), strict=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    merging = _Merging(paths, names, max_shard_bytes)
    found = resolve(method, paths, lambda some: merging.write_for_now(out, some))
    merging.write(out, method, found, progress="merging" if progress else None)
    return found


class _Merging:
    """Checkpoints that can be merged: their tensors, by the names of the first.

    Raises:
        ValueError: they cannot.
    """

    def __init__(self, paths: Sequence[Path], names: Sequence[str], max_shard_bytes: int) -> None:
        self.paths, self.names, self.max_shard_bytes = paths, names, max_shard_bytes
        labels = [str(path) for path in paths]
        configs = [_read_config(path) for path in paths]
        check_configs(labels, [with_defaults(config) for config in configs])
        check_tokenizers(paths)
        table = next((t for t in TABLES if configs[0]["model_type"] in t.model_types), None)
        headers = [_stored(path, table) for path in paths]
        tied = table.tied if table and with_defaults(configs[0]).get("tie_word_embeddings") else ()
        self.models = [_by_names(header, headers[0], tied) for header in headers]
        check_tensors(labels, [_described(model) for model in self.models])

    def write(
        self, out: Path, method: Any, coefficients: Sequence[float], *, progress: str | None
    ) -> None:
        """Write the sum of the checkpoints."""
        record = _record(method, self.names, coefficients)
        write_checkpoint(
            out,
            self.models[0],
            lambda name: self._tensor(name, coefficients),
            texts={
                "config.json": (self.paths[0] / "config.json").read_text(encoding="utf-8"),
                "apical_merge.json": as_json(record),
                "README.md": _card(out, record),
            },
            beside=self.paths[0],
            same=" ".join(fingerprint(model, record) for model in self.models),
            what="the merged checkpoint",
            max_shard_bytes=self.max_shard_bytes,
            progress=progress,
        )

    @contextmanager
    def write_for_now(self, out: Path, some: Sequence[int]) -> Iterator[Path]:
        """Give a directory with the average of some of the checkpoints, and remove it after."""
        shares = [(i in some) / len(some) for i in range(len(self.paths))]
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.soup-", dir=out.parent) as scratch:
            self.write(Path(scratch) / out.name, Average(), shares, progress=None)
            yield Path(scratch) / out.name

    def _tensor(self, name: str, coefficients: Sequence[float]) -> Tensor | Stored:
        stored = [model[name] for model in self.models]
        # nothing to compute: bytes are copied
        if not stored[0].dtype.is_floating_point or len(stored) == coefficients[0] == 1:
            return stored[0]
        return combine([tensor.read for tensor in stored], coefficients)


def _read_config(source: Path) -> dict[str, Any]:
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a directory; expected a checkpoint directory")
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json; expected a checkpoint directory")
    config = read_json(source / "config.json")
    transformers = require("transformers", extra="hf", what="merging checkpoints")
    if config.get("model_type") not in transformers.CONFIG_MAPPING:
        kind = config.get("model_type")
        raise ValueError(f"{source} has model_type {kind!r}, which transformers does not know")
    return config


def _stored(path: Path, table: Architecture | None) -> dict[str, Stored]:
    """Return the tensors of a checkpoint but for those that its model computes itself."""
    stored = read_headers(path, integers=True)
    return {n: tensor for n, tensor in stored.items() if not (table and table.is_derived(n))}


def _by_names(
    stored: Mapping[str, Stored],
    names: Mapping[str, Stored],
    tied: Sequence[Sequence[str]],
) -> dict[str, Stored]:
    """Return the tensors by the names of another checkpoint, where tied ones may be left out."""
    found = dict(stored)
    for group in tied:
        here = [name for name in group if name in stored]
        there = [name for name in group if name in names]
        if (
            here
            and there
            and here != there
            and all(_same(stored[here[0]], stored[n]) for n in here[1:])
        ):
            found = {name: t for name, t in found.items() if name not in group}
            found |= dict.fromkeys(there, stored[here[0]])
    return found


def _same(one: Stored, other: Stored) -> bool:
    return one.shape == other.shape and torch.equal(one.read(), other.read())


def _described(model: Mapping[str, Stored]) -> dict[str, Described]:
    return {name: Described(s.shape, s.dtype, s.read) for name, s in model.items()}


def _record(method: Any, names: Sequence[str], coefficients: Sequence[float]) -> dict[str, Any]:
    options = {} if isinstance(method, GreedySoup) else asdict(method)
    return {
        "method": type(method).__name__,
        "options": options,
        "sources": [
            {"name": name, "coefficient": share}
            for name, share in zip(names, coefficients, strict=True)
        ],
    }


def _card(out: Path, record: Mapping[str, Any]) -> str:
    rows = "".join(f"| {row['name']} | {row['coefficient']:.6g} |\n" for row in record["sources"])
    options = ", ".join(f"{k}={v}" for k, v in record["options"].items() if v is not None)
    return (
        "---\nlibrary_name: transformers\ntags: [apical, model-merging]\n---\n\n"
        f"# {out.name}, merged by {record['method']}({options})\n\n"
        "Each weight of this checkpoint is the sum below over those of the merged checkpoints. It "
        "loads with plain `AutoModel*.from_pretrained`; `apical_merge.json` says the same.\n\n"
        f"| checkpoint | coefficient |\n|---|---|\n{rows}"
    )
