"""Between two levels: a large model, moved some way towards a small one that was trained since."""

import copy
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .operators.decoalesce import Decoalesce
from .plan import Operator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")


@dataclass(frozen=True)
class Interpolate:
    """(1 - alpha) times a large model plus alpha times a small one that was brought to its size.

    It needs two models, so it is no plan: `models` and `checkpoints` apply it. It is a method of
    `apical.merge` as well, for two models of one size.

    Args:
        alpha: how far to go, from 0 (the large model) to 1; the paper uses 0.25 to 0.5.

    Raises:
        ValueError: alpha is not between 0 and 1.

    Source: A Multi-Level Framework, arXiv 2404.07999, interpolation.
    """

    alpha: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha!r}; expected a number from 0 to 1")

    def coefficients(self, count: int) -> tuple[float, ...]:
        """Return how much of each model there is.

        Raises:
            ValueError: there are not two.
        """
        if count != 2:
            raise ValueError(f"Interpolate is between 2 models, got {count}; expected large, small")
        return 1 - self.alpha, self.alpha

    def models(self, large: Model, small: Model, by: Operator | None = None) -> Model:
        """Return a new model between a large one and a small one.

        Args:
            large, small: transformers models of one family; both stay as they are.
            by: brings the small one to the size of the large one; Decoalesce() unless given.

        Raises:
            ValueError: it does not, or the models are of different architectures.
        """
        from .apply import grow
        from .merge import merge

        by = by or Decoalesce()
        grown = grow(small, by)
        changed = by.plan(small.config.to_dict()).config_changes(small.config.to_dict())
        # sizes that one config states and the other implies are the same sizes
        grown.config.update({key: _value(large.config, key) for key in changed})
        return merge((large, grown), self)

    def checkpoints(
        self,
        large: str | Path,
        small: str | Path,
        out: str | Path,
        by: Operator | None = None,
        *,
        max_shard_bytes: int = 5_000_000_000,
        progress: bool = False,
    ) -> None:
        """Write a checkpoint directory between a large one and a small one.

        The small one is brought to the size of the large one beside `out` for a moment.

        Args:
            large, small: directories with config.json and safetensors.
            out: directory to make; its parents are made too.
            by: as of `models`.
            max_shard_bytes: size of an output file, unless one tensor alone is larger.
            progress: show progress bars on stderr.

        Raises:
            FileExistsError, FileNotFoundError, ValueError, OSError: as `apical.merge_checkpoints`.
        """
        from .checkpoint_output import check_output
        from .merge import merge_checkpoints
        from .shards import grow_checkpoint

        out, by = Path(out), by or Decoalesce()
        check_output(out, max_shard_bytes)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as place:
            grown = Path(place) / "grown"
            grow_checkpoint(small, grown, by, max_shard_bytes=max_shard_bytes, progress=progress)
            _take_sizes(Path(large), Path(small), grown, by)
            merge_checkpoints(
                (large, grown), out, self, max_shard_bytes=max_shard_bytes, progress=progress
            )


def _value(config: Any, key: str) -> Any:
    return copy.deepcopy(getattr(config, key, None))


def _take_sizes(large: Path, small: Path, grown: Path, by: Operator) -> None:
    # as in `models`; what differs beside sizes is still refused
    from .checkpoint_files import read_config, with_defaults

    old = with_defaults(read_config(small))
    full, config = with_defaults(read_config(large)), read_config(grown)
    config |= {key: full.get(key) for key in by.plan(old).config_changes(old)}
    (grown / "config.json").write_text(json.dumps(config, indent=2))
