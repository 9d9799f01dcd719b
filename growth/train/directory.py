"""The directory of a run: what lies where, and how a new run gets an empty one."""

import itertools
from pathlib import Path


class RunDirectory:
    """Paths of a run's files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.metrics = root / "metrics.jsonl"
        self.recipe = root / "recipe.yaml"
        self.steps = root / "steps"
        # written last: a run is finished when it is there
        self.model = root / "checkpoint"
        self.report = root / "report.html"

    @property
    def is_finished(self) -> bool:
        return self.model.is_dir()

    @property
    def has_saved(self) -> bool:
        """Whether a checkpoint was ever finished here, good or damaged."""
        return any(not path.name.endswith(".tmp") for path in self.steps.glob("step-*"))

    def create(self, recipe: str) -> Path | None:
        """Make the directory, and return where an earlier one with that name was moved to."""
        aside = _move_aside(self.root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.recipe.write_text(recipe, encoding="utf-8")
        return aside

    def require_run(self) -> None:
        """Check that there is a run to resume.

        Raises:
            FileNotFoundError: there is none.
        """
        if not self.recipe.is_file():
            raise FileNotFoundError(
                f"{self.root} holds no run to resume; start one without --resume"
            )


def _move_aside(root: Path) -> Path | None:
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"output {root} is a file; expected a directory")
    if not root.is_dir() or not any(root.iterdir()):
        return None
    free = next(path for n in itertools.count(1) if not (path := Path(f"{root}.{n}")).exists())
    root.rename(free)
    return free
