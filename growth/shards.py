"""Runs a plan over a checkpoint directory, with memory for one tensor and no more."""

from pathlib import Path

import torch
from torch import Tensor

from .apply import as_tied
from .card import plan_texts
from .checkpoint_files import fingerprint, read_config, read_headers, with_defaults
from .checkpoint_output import as_json, check_output, write_checkpoint
from .gguf import grow_gguf
from .mapping import Mapper
from .plan import GrowthPlan, Operator
from .source import fetched, gguf_of
from .spaces import architecture_of, check_tensors
from .spaces.naming import Naming
from .tensor_file import Form, Stored


def grow_checkpoint(
    source: str | Path,
    out: str | Path,
    operator: Operator,
    *,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = False,
) -> GrowthPlan:
    """Grow a checkpoint directory into another one, and return the plan that did it.

    `out` is a stock transformers directory: safetensors, config, tokenizer files, a model card,
    and the plan in apical_growth.json. It is written under another name beside `out` and renamed
    when it is whole, so that `out` is complete or not there. After a kill, the same call goes on
    with the files that are not finished. Memory: one tensor, whatever the size of the model; all of
    it for GGUF.

    Precision: weights that stay are bit for bit the old ones, copied without being read; others
    keep their dtypes, 8-bit ones by way of float32.

    Args:
        source: directory with config.json and model.safetensors, or the index of its shards; the
            name of a model on the Hugging Face hub; or a GGUF file, or a directory with one.
        out: directory to make; its parents are made too.
        operator: for example `apical.Stack(factor=2)`, or `SavedPlan("plan.yaml")`.
        max_shard_bytes: size of an output file, unless one tensor alone is larger.
        progress: show a progress bar on stderr.

    Raises:
        FileExistsError: `out` exists; nothing is overwritten.
        FileNotFoundError: `source`, its config or its safetensors are not there.
        ValueError: a file of `source` is unreadable, its tensors are not those of its family, or
            a new one is the sum of tensors of different dtypes.
        NotImplementedError: the model's family has no table in growth/spaces.
        OSError: the disk is full, or the hub is not reached; what was written is removed.

    Source: ours.
    """
    out = Path(out)
    check_output(out, max_shard_bytes)
    if gguf := gguf_of(source):
        return grow_gguf(gguf, out, operator, max_shard_bytes=max_shard_bytes)
    directory, name = fetched(source)
    growing = _Growing(directory, operator)
    plan = growing.plan
    write_checkpoint(
        out,
        growing.forms(),
        growing.tensor,
        texts=growing.texts(name),
        beside=directory,
        same=fingerprint(growing.stored, growing.config, plan.to_dict()),
        what="the grown checkpoint",
        max_shard_bytes=max_shard_bytes,
        progress="growing" if progress else None,
    )
    return plan


class _Growing:
    """A checkpoint, and what a plan makes of its tensors.

    Raises:
        ValueError: it is no checkpoint of its family, or the plan sums different dtypes.
    """

    def __init__(self, source: Path, operator: Operator) -> None:
        self.config = read_config(source)
        full = with_defaults(self.config)
        self.stored = read_headers(source)
        table = architecture_of(full)
        self.naming = Naming.of(table, self.stored)
        self.old = {self.naming.whole(name): tensor for name, tensor in self.stored.items()}
        self.full = as_tied(table, full, self.old)
        self.plan = operator.plan(self.full)
        shapes = {name: tensor.shape for name, tensor in self.old.items()}
        check_tensors(self.full, shapes, head=self.naming.whole_model)
        self.mapper = Mapper(self.plan, self.full)

    def forms(self) -> dict[str, Form]:
        """Return what every tensor of the grown checkpoint will be, by their names there."""
        return {
            self.naming.stored(name): Form(self.mapper.shape(name), self._dtype(name))
            for name in self.plan.names(self.old)
        }

    def tensor(self, name: str) -> Tensor | Stored:
        """Return one of them, or where its bytes lie."""
        name = self.naming.whole(name)
        if same := self.mapper.copies(name):
            return self.old[same]
        source, dtype = self.plan.sources(name), self._dtype(name)
        # PyTorch has no arithmetic in 8 bits
        wide = torch.float32 if dtype.itemsize == 1 else dtype
        # what is constant needs a dtype, and nothing of the old values
        constant = source.zero or not source.terms

        def read(old: str) -> Tensor:
            return torch.empty(0, dtype=wide) if constant else self.old[old].read().to(wide)

        grown = self.mapper.tensor(name, read)
        return grown if wide == dtype else _narrowed(grown, dtype)

    def texts(self, name: str) -> dict[str, str]:
        """Return the new files without weights; `name` is that of the old checkpoint."""
        # older configs leave the lists with one entry per layer to be computed from the depth
        keys = architecture_of(self.full).per_layer_keys
        config = self.config | {key: self.full[key] for key in keys if self.full.get(key)}
        return plan_texts(self.plan, name) | {
            "config.json": as_json(self.plan.grown_config(config))
        }

    def _dtype(self, name: str) -> torch.dtype:
        terms = self.plan.sources(name).terms
        if not terms:
            return next(iter(self.old.values())).dtype
        first = self.old[terms[0][0]]
        for other, _ in terms[1:]:
            if self.old[other].dtype != first.dtype:
                raise ValueError(
                    f"{name} is to be the sum of {first.name} in {first.dtype} and {other} in "
                    f"{self.old[other].dtype}; expected one dtype, convert the checkpoint to one"
                )
        return first.dtype


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to 8 bits; what is too large becomes the largest number instead of NaN."""
    largest = torch.finfo(dtype).max
    return tensor.clamp(-largest, largest).to(dtype)
