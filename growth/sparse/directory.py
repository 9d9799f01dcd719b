"""A rule over a checkpoint directory."""

import secrets
from pathlib import Path

from ..checkpoint_output import check_output, copy_others
from ..progress_bars import without_bars
from ..publish import published
from .convert import replaced, sparsify
from .files import load
from .rules import Rule


def sparsify_checkpoint(
    source: str | Path, out: str | Path, rule: Rule, *, max_shard_bytes: int = 5_000_000_000
) -> str:
    """Write a checkpoint directory with linear layers replaced by a rule; return what was done.

    `out` loads with `apical.load`. Tokenizer, generation config and licence are copied. It is
    written under another name and renamed when it is whole. Memory: the whole model.

    Args:
        source: directory of a transformers model, which may have sparse layers already.
        out: directory to make; its parents are made too.
        rule: see `apical.sparsify`.
        max_shard_bytes: size of an output file, unless one tensor alone is larger.

    Raises:
        FileExistsError: `out` exists; nothing is overwritten.
        ValueError: `source` is unreadable, or refuses the rule.
        OSError: files are missing, or the disk is full; what was written is removed.

    Source: ours.
    """
    source, out = Path(source), Path(out)
    check_output(out, max_shard_bytes)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json; expected a checkpoint directory")
    with without_bars():
        model = load(source, dtype="auto")
    before = sum(parameter.numel() for parameter in model.parameters())
    sparsify(model, rule)
    after = sum(parameter.numel() for parameter in model.parameters())
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f"{out.name}.tmp-{secrets.token_hex(4)}")
    with published(out, unfinished=scratch), without_bars():
        model.save_pretrained(scratch, max_shard_size=max_shard_bytes)
        copy_others(source, scratch)
    return f"{rule}: {len(replaced(model))} layers, {before:,} -> {after:,} parameters"
