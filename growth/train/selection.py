"""SALT's choice of what is read: every piece of a source scored by the teacher, once."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..objectives import median_scores, select_by_median_loss
from .data.batches import on_device
from .data.cache import cache_dir, cached
from .data.packing import in_order
from .data.source import TokenSource
from .objective import next_tokens
from .teacher import Teacher

if TYPE_CHECKING:
    from .recipe.schema import Stage

_FILE = "scores.npy"


def selector(
    stage: "Stage", teacher: Teacher | None
) -> Callable[[TokenSource], TokenSource] | None:
    """Return what reduces a source to the pieces that a stage's recipe selects; None for none."""
    select = stage.objective.select if stage.objective.kind == "salt" else None
    if select is None:
        return None
    assert teacher is not None
    return partial(
        _chosen,
        teacher=teacher,
        keep=select.keep,
        top_k=select.top_k,
        batch_tokens=stage.batch_tokens,
    )


def _chosen(
    source: TokenSource, *, teacher: Teacher, keep: float, top_k: int, batch_tokens: int
) -> TokenSource:
    count = max(1, round(keep * len(source)))
    scores = _scores(source, teacher, top_k=top_k, batch_tokens=batch_tokens)
    pieces = select_by_median_loss(torch.from_numpy(scores), keep=count)
    return source.choose(pieces.numpy())


def _scores(source: TokenSource, teacher: Teacher, *, top_k: int, batch_tokens: int) -> np.ndarray:
    """Return the score of every piece, (pieces,); the teacher is asked once and for all runs."""
    identity = f"{source.fingerprint}:{teacher.digest()}:{top_k}:{batch_tokens}"
    path = cache_dir() / "scores" / hashlib.sha256(identity.encode()).hexdigest()[:32]

    def build(directory: Path) -> None:
        parts = []
        for batch in in_order(source, pieces=len(source), batch_tokens=batch_tokens):
            inputs = on_device(batch.model_inputs(packed=True), teacher.model.device)
            target = next_tokens(inputs["labels"])
            each = teacher.scores(inputs, target, top_k=top_k)
            valid, bounds = target != -100, inputs["cu_seq_lens_q"]
            parts.append(median_scores(*each, valid, bounds).cpu())
        np.save(directory / _FILE, torch.cat(parts).numpy())

    return np.load(cached(path, build) / _FILE)
