"""Grows GGUF files: transformers reads them, so the whole model is in memory."""

from pathlib import Path

from apical._extras import require

from .apply import grow
from .card import plan_texts
from .plan import GrowthPlan, Operator
from .progress_bars import without_bars
from .publish import published
from .source import for_transformers


def grow_gguf(
    file: Path, out: Path, operator: Operator, *, max_shard_bytes: int = 5_000_000_000
) -> GrowthPlan:
    """Grow a GGUF file into a stock directory of float32 safetensors, and return the plan.

    Weights are those that transformers decodes, in float32; the tokenizer is the file's own.

    Args:
        file: the GGUF file.
        out: directory to make; its parents are made too.
        operator: see `grow_checkpoint`.
        max_shard_bytes: size of an output file, unless one tensor alone is larger.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: transformers cannot read the file.
        OSError: the disk is full; what was written is removed.

    Source: ours.
    """
    transformers = require("transformers", extra="hf", what="reading GGUF")
    where = for_transformers(file)
    with without_bars():
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    # transformers keeps saying that it is quantised; it is not any more
    for holder, key in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if getattr(holder, key, None) is not None:
            delattr(holder, key)
    plan = operator.plan(model.config.to_dict())
    grown = grow(model, operator)
    del model
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.unfinished")
    with published(out, unfinished=unfinished), without_bars():
        grown.save_pretrained(unfinished, max_shard_size=max_shard_bytes)
        tokenizer.save_pretrained(unfinished)
        for name, text in plan_texts(plan, file.name).items():
            (unfinished / name).write_text(text, encoding="utf-8")
    return plan
