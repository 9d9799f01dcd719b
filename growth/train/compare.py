"""The arm that growth is measured against: the grown architecture, trained from scratch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from .recipe.schema import Recipe, Stage
from .results.summary import Record, summarise
from .results.tables import Table

_EVALUATIONS = 20

Curve = list[tuple[int, float]]  # (training FLOPs so far, held-out loss on the mixture)


@dataclass(frozen=True)
class Comparison:
    """Both arms' curves, up to the end of the stage that grew the model."""

    stage: str
    grown: Curve
    scratch: Curve

    @property
    def target(self) -> float:
        return self.grown[-1][1]

    @property
    def reached(self) -> int | None:
        """FLOPs of the first evaluation from scratch that is at or below the grown model's loss."""
        return next((flops for flops, loss in self.scratch if loss <= self.target), None)

    def table(self) -> Table:
        spent, budget = self.grown[-1][0], self.scratch[-1][0]
        rows = [
            ("grown", f"{self.target:.4f}", f"{spent:.3e}"),
            ("from scratch, its whole budget", f"{self.scratch[-1][1]:.4f}", f"{budget:.3e}"),
        ]
        if self.reached is None:
            rows.append(("from scratch, to the grown loss", "", f"not reached within {budget:.3e}"))
        else:
            ratio = self.reached / spent
            cost = f"{self.reached:.3e} ({ratio:.2f} of the grown)"
            rows.append(("from scratch, to the grown loss", f"{self.target:.4f}", cost))
        return Table(
            f"Growth against scratch, at the end of {self.stage}", ("", "loss", "FLOPs"), rows
        )

    @property
    def note(self) -> str:
        return (
            "Growth against scratch: one seed; both arms begin from the same kind of random "
            "weights; the one from scratch has the same peak learning rate and a cosine of its "
            "own over as many FLOPs as the grown model spent. Its loss is taken at "
            f"{len(self.scratch)} evaluations; before the last of them its learning rate has not "
            "decayed to the end. The loss is that of the sources, weighted as in training. In a "
            "small model much of a difference can come from the initial weights and the learning "
            "rate, which are tuned for neither arm."
        )


def check_comparable(recipe: Recipe) -> None:
    """Check that a recipe has a model that can also be trained from scratch.

    Raises:
        ValueError: it has none, or the losses to compare are not evaluated.
    """
    last = _last_growth(recipe)
    if recipe.stages[0].model.from_ != "scratch":
        raise ValueError("--compare scratch needs a first stage whose model is from scratch")
    for index, stage in enumerate(recipe.stages[: last + 1]):
        if index and stage.model.from_ != "previous":
            raise ValueError(f"--compare scratch needs stages[{index}].model to be from previous")
        missing = set(_mixture(recipe.stages[: last + 1])) - set(stage.evaluate or recipe.sources)
        if missing:
            raise ValueError(
                f"--compare scratch needs stages[{index}].evaluate to name {sorted(missing)}"
            )


def scratch_recipe(recipe: Recipe, records: Sequence[Record]) -> Recipe:
    """Return the recipe of the arm from scratch: one stage, with the FLOPs of the grown arm.

    Args:
        records: of the finished run of `recipe`.
    """
    last = _last_growth(recipe)
    first, grown = recipe.stages[0], recipe.stages[last]
    spent = summarise(records)[: last + 1]
    budget = sum(stage.flops for stage in spent)
    data = recipe.resolved()
    data["name"], data["stages"] = f"{recipe.name}-scratch", [data["stages"][0]]
    data["stages"][0] |= {
        "name": "scratch",
        "model": {"from": "scratch", "config": _grown_config(recipe.stages[: last + 1])},
        "data": _mixture(recipe.stages[: last + 1]),
        # the grown stage shows what a step costs in this architecture and on this text
        "tokens": round(budget / spent[last].flops * spent[last].steps * grown.batch_tokens),
        "batch_tokens": grown.batch_tokens,
        "context": grown.context,
        "sparsity": None if grown.exports else grown.sparsity,
        "schedule": {
            "kind": "cosine",
            "peak": first.schedule.peak,
            "warmup": first.schedule.warmup,
        },
        "evaluate_tokens": grown.evaluate_tokens,
    }
    return Recipe.model_validate(data)


def evaluation_interval(scratch: Recipe) -> int:
    """Return the steps between evaluations of the arm from scratch."""
    stage = scratch.stages[0]
    return max(1, stage.tokens // stage.batch_tokens // _EVALUATIONS)


def compare_arms(
    recipe: Recipe, records: Sequence[Record], scratch: Sequence[Record]
) -> Comparison:
    """Return the comparison of two finished runs.

    Args:
        records: of the run of `recipe`, which grows a model.
        scratch: of the run of `scratch_recipe`.
    """
    last = _last_growth(recipe)
    stages = recipe.stages[: last + 1]
    names, mixture = {stage.name for stage in stages}, _mixture(stages)
    own = [record for record in records if record.get("stage") in names]
    return Comparison(stages[-1].name, _curve(own, mixture), _curve(scratch, mixture))


def _last_growth(recipe: Recipe) -> int:
    grown = [index for index, stage in enumerate(recipe.stages) if stage.model.grow]
    if not grown:
        raise ValueError("--compare scratch needs a stage that grows its model (model.grow)")
    return grown[-1]


def _mixture(stages: Sequence[Stage]) -> dict[str, float]:
    """Return the share of each source in the tokens of all these stages."""
    total = sum(stage.tokens for stage in stages)
    shares: dict[str, float] = {}
    for stage in stages:
        weights = sum(stage.data.values())
        for name, weight in stage.data.items():
            if weight:
                share = weight / weights * stage.tokens / total
                shares[name] = shares.get(name, 0.0) + share
    return shares


def _grown_config(stages: Sequence[Stage]) -> dict[str, Any]:
    config = dict(stages[0].model.config or {})
    for stage in stages:
        if (operator := stage.model.operator()) is not None:
            full = AutoConfig.for_model(**config).to_dict()
            config |= operator.plan(full).config_changes(full)
    return config


def _curve(records: Sequence[Record], mixture: dict[str, float]) -> Curve:
    evals = [record for record in records if record["kind"] == "eval"]
    return [
        (r["flops"], sum(share * r[f"loss/{name}"] for name, share in mixture.items()))
        for r in evals
    ]
