"""What a run's records amount to: losses before and after each stage, forgetting, cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .tables import Table

Record = dict[str, Any]


@dataclass(frozen=True)
class StageSummary:
    """One stage. Losses are nats per token on held-out text, by source.

    forgetting: of a stage that brings a source which no stage before it was trained on: how much
    the loss on each source trained on before rose; negative where it fell.
    """

    name: str
    parameters: int
    steps: int
    tokens: int
    flops: int
    seconds: float
    tokens_by_source: dict[str, int]
    before: dict[str, float]
    after: dict[str, float]
    bits_before: dict[str, float]
    bits_after: dict[str, float]
    forgetting: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def summarise(records: Sequence[Record]) -> list[StageSummary]:
    """Return the stages that a run has finished, from its records alone."""
    seen: set[str] = set()
    stages = []
    for start in (record for record in records if record["kind"] == "stage"):
        own = [r for r in records if r.get("stage") == start["stage"]]
        if any(r["kind"] == "eval" and r["when"] == "after" for r in own):
            stages.append(_summary(start, own, seen))
        seen |= set(start["sources"])
    return stages


def final_record(stages: Sequence[StageSummary]) -> Record:
    """Return the last record of a run: its final losses, its forgetting, its cost."""
    seconds = sum(stage.seconds for stage in stages)
    tokens = sum(stage.tokens for stage in stages)
    record: Record = {
        "kind": "final",
        "step": sum(stage.steps for stage in stages),
        "tokens": tokens,
        "flops": sum(stage.flops for stage in stages),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
    }
    for stage in stages:
        record |= {f"loss_before/{stage.name}/{k}": v for k, v in stage.before.items()}
        record |= {f"loss_after/{stage.name}/{k}": v for k, v in stage.after.items()}
        record |= {f"loss_forgetting/{stage.name}/{k}": v for k, v in stage.forgetting.items()}
    record |= {f"loss/{name}": loss for name, loss in stages[-1].after.items()}
    record |= {f"bits_per_byte/{name}": bits for name, bits in stages[-1].bits_after.items()}
    return record


def loss_table(stages: Sequence[StageSummary]) -> Table:
    header = ("stage", "domain", "before", "after", "change", "bits/byte", "forgetting")
    return Table(
        "Loss per domain (nats per token, held-out text)",
        header,
        [
            (
                stage.name,
                source,
                f"{stage.before[source]:.4f}",
                f"{stage.after[source]:.4f}",
                f"{stage.after[source] - stage.before[source]:+.4f}",
                f"{stage.bits_after[source]:.4f}",
                f"{stage.forgetting[source]:+.4f}" if source in stage.forgetting else "",
            )
            for stage in stages
            for source in stage.after
        ],
    )


def cost_table(stages: Sequence[StageSummary]) -> Table:
    return Table(
        "Cost",
        ("stage", "parameters", "steps", "tokens", "of which", "tokens/s", "FLOPs"),
        [
            (
                stage.name,
                f"{stage.parameters:,}",
                f"{stage.steps:,}",
                f"{stage.tokens:,}",
                _shares(stage.tokens_by_source),
                f"{stage.tokens_per_second:,.0f}",
                f"{stage.flops:.3e}",
            )
            for stage in stages
        ],
    )


def _summary(start: Record, own: Sequence[Record], seen: set[str]) -> StageSummary:
    evals = {r["when"]: r for r in own if r["kind"] == "eval" and r["when"] != "during"}
    train = [r for r in own if r["kind"] == "train"]
    before, after = _values(evals["before"], "loss"), _values(evals["after"], "loss")
    continual = bool(seen) and not set(start["sources"]) <= seen
    return StageSummary(
        name=start["stage"],
        parameters=start["parameters"],
        steps=start["steps"],
        tokens=evals["after"]["tokens"] - evals["before"]["tokens"],
        flops=evals["after"]["flops"] - evals["before"]["flops"],
        seconds=sum(r["seconds"] for r in train),
        tokens_by_source=_total_by_source(train),
        before=before,
        after=after,
        bits_before=_values(evals["before"], "bits_per_byte"),
        bits_after=_values(evals["after"], "bits_per_byte"),
        forgetting={k: after[k] - before[k] for k in before if continual and k in seen},
    )


def _values(record: Record, prefix: str) -> dict[str, float]:
    return {k.split("/", 1)[1]: v for k, v in record.items() if k.startswith(f"{prefix}/")}


def _total_by_source(train: Sequence[Record]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for record in train:
        for name, tokens in record["tokens_by_source"].items():
            totals[name] = totals.get(name, 0) + tokens
    return totals


def _shares(tokens: dict[str, int]) -> str:
    total = sum(tokens.values())
    return ", ".join(f"{name} {count / total:.0%}" for name, count in sorted(tokens.items()))
