"""Runs a plan over a checkpoint directory, with memory for one output shard and no more."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .apply import grow_tensor
from .checkpoint_files import read_config, read_headers, with_defaults
from .checkpoint_output import as_json, check_output, write_checkpoint
from .plan import GrowthPlan, Operator
from .spaces import architecture_of, check_tensors


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
    when it is whole, so that `out` is complete or not there. Memory: one output shard and one
    tensor, whatever the size of the model.

    Precision: copied weights are bit for bit the old ones, in their own dtypes.

    Args:
        source: directory with config.json and model.safetensors, or the index of its shards.
        out: directory to make; its parents are made too.
        operator: for example `apical.Stack(factor=2)`.
        max_shard_bytes: size of an output file, unless one tensor alone is larger.
        progress: show a progress bar on stderr.

    Raises:
        FileExistsError: `out` exists; nothing is overwritten.
        FileNotFoundError: `source`, its config or its safetensors are not there.
        ValueError: a file of `source` is unreadable, or its tensors are not those of its family.
        NotImplementedError: the model's family has no table in growth/spaces.py.
        OSError: the disk is full; what was written is removed.

    Source: ours.
    """
    source, out = Path(source), Path(out)
    check_output(out, max_shard_bytes)
    config = read_config(source)
    full = with_defaults(config)
    stored = read_headers(source)
    plan = operator.plan(full)
    check_tensors(full, {name: tensor.shape for name, tensor in stored.items()})
    sizes = {name: stored[plan.sources(name).terms[0][0]].nbytes for name in plan.names(stored)}
    write_checkpoint(
        out,
        sizes,
        lambda name: grow_tensor(plan.sources(name), lambda old: stored[old].read()),
        texts={
            "config.json": as_json(plan.grown_config(config | _per_layer(full))),
            "apical_growth.json": as_json(plan.to_dict()),
            "README.md": _card(source, plan),
        },
        beside=source,
        what="the grown checkpoint",
        max_shard_bytes=max_shard_bytes,
        progress="growing" if progress else None,
    )
    return plan


def _per_layer(full: Mapping[str, Any]) -> dict[str, Any]:
    """Return the per-layer lists; older configs leave them to be computed from the depth."""
    return {key: full[key] for key in architecture_of(full).per_layer_keys if full.get(key)}


def _card(source: Path, plan: GrowthPlan) -> str:
    kept = (
        "computes what the source computes"
        if plan.preserves_function
        else "is to be trained further"
    )
    return (
        "---\nlibrary_name: transformers\ntags: [apical, model-growth]\n---\n\n"
        f"# {source.resolve().name}, grown by {plan.operator}\n\n"
        f"This checkpoint was grown from `{source.resolve().name}` by apical; it {kept}. "
        "It loads with plain `AutoModelForCausalLM.from_pretrained`. The whole plan is in "
        f"`apical_growth.json`.\n\n```\n{plan}\n```\n"
    )
