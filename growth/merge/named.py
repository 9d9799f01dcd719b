"""Methods by name, as the command line gives them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .methods import EMA, Average, Linear, Method, Posterior, TaskVectors
from .soup import GreedySoup
from .text_loss import text_loss

Name = Literal["average", "linear", "ema", "task-vectors", "greedy-soup", "posterior"]
_NEEDS = {"linear": "weights", "ema": "decay", "greedy-soup": "text", "posterior": "weights"}
_TAKES = _NEEDS | {"average": "weights", "task-vectors": "weights"}


def named(
    name: Name, *, weights: Sequence[float] = (), decay: float | None = None, text: Path | None
) -> Method | GreedySoup:
    """Return the method with its numbers.

    Args:
        name: of the method.
        weights: of average and linear; of task-vectors the scales, or one for all (1 unless given);
            of posterior the log-likelihoods.
        decay: of ema.
        text: of greedy-soup: a file, on which the loss of causal language models is the score.

    Raises:
        ValueError: the method needs what is missing, or does not take what is given.
    """
    given = {"weights": weights, "decay": decay, "text": text}
    for option, value in given.items():
        missing = value is None or value == ()
        if missing and _NEEDS.get(name) == option:
            raise ValueError(f"--{option} is missing; expected one with --method {name}")
        if not missing and _TAKES[name] != option:
            raise ValueError(
                f"--{option} does not belong to --method {name}; expected --{_TAKES[name]}"
            )
    if text is not None:
        return _soup(text)
    if decay is not None:
        return EMA(decay)
    if name == "task-vectors":
        return _tasks(weights)
    if name == "average":
        return Average(weights or None)
    return {"linear": Linear, "posterior": Posterior}[name](weights)


def _tasks(scales: Sequence[float]) -> TaskVectors:
    if len(scales) > 1:
        return TaskVectors(scales=scales)
    return TaskVectors(scales[0] if scales else 1.0)


def _soup(text: Path) -> GreedySoup:
    if not text.is_file():
        raise FileNotFoundError(f"--text is {text}, which is not a file; expected held-out text")
    # a soup looks for more, a loss is better when it is less
    return GreedySoup(lambda directory: -text_loss(directory, text))
