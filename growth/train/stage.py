"""The live state of a stage, and how one step changes it."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.optim import Optimizer
from transformers import PreTrainedModel

from ..continual import ScheduleLR
from .data.batches import piece_lengths, predicted_tokens
from .data.packing import BatchStream, PackedBatch
from .flops import causal_pairs
from .model import model_tensors
from .objective import BatchLoss
from .optimizer import build_schedule, moments, norm_of_gradients
from .outline import StagePlan


@dataclass
class Counters:
    """What a run has done so far, and since its last training record."""

    step: int = 0
    tokens: int = 0
    flops: int = 0
    window_nats: float = 0.0
    window_labels: int = 0
    window_tokens: dict[str, int] = field(default_factory=dict)
    window_seconds: float = 0.0

    def add(self, batch: PackedBatch, loss: float, *, flops: int, seconds: float) -> None:
        lengths = piece_lengths(batch)
        labels = predicted_tokens(batch)
        self.step += 1
        self.tokens += sum(lengths)
        self.flops += flops
        self.window_nats += loss * labels
        self.window_labels += labels
        self.window_seconds += seconds
        for name, length in zip(batch.sources, lengths, strict=True):
            self.window_tokens[name] = self.window_tokens.get(name, 0) + length

    def close_window(self) -> dict[str, Any]:
        """Return the mean loss and the tokens since the last call, and begin anew."""
        closed = {
            "loss": self.window_nats / self.window_labels,
            "tokens_by_source": self.window_tokens,
            "seconds": self.window_seconds,
            "tokens_per_second": sum(self.window_tokens.values()) / self.window_seconds,
        }
        self.window_nats, self.window_labels, self.window_seconds = 0.0, 0, 0.0
        self.window_tokens = {}
        return closed


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second: float


class StageState:
    """Everything that a step of this stage changes, and all of it goes into a checkpoint."""

    def __init__(
        self,
        plan: StagePlan,
        model: PreTrainedModel,
        optimizer: Optimizer,
        stream: BatchStream,
        counters: Counters,
        loss: BatchLoss,
    ) -> None:
        self.plan, self.model, self.optimizer = plan, model, optimizer
        self.stream, self.counters = stream, counters
        schedule = build_schedule(plan.spec.schedule, steps=plan.steps)
        self.scheduler = ScheduleLR(optimizer, schedule)
        self._loss = loss
        self.step_in_stage = 0

    def step(self) -> StepResult:
        """Take one step.

        Raises:
            ValueError: the loss or the gradient is not finite; no weight was changed by it, but
                where the optimizer steps per layer.
        """
        start = time.perf_counter()
        batch = self.stream.next()
        loss = self._backward(batch)
        clip = self.plan.spec.optimizer.clip
        norm = norm_of_gradients(self.model, self.optimizer, clip=clip)
        self.refuse_unless_finite("the loss", loss)
        self.refuse_unless_finite("the norm of the gradient", norm)
        lr = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self._loss.after_step(self.model)
        flops = self._flops(piece_lengths(batch))
        self.step_in_stage += 1
        seconds = time.perf_counter() - start
        lengths = piece_lengths(batch)
        self.counters.add(batch, loss, flops=flops, seconds=seconds)
        return StepResult(loss, norm, float(lr), sum(lengths) / seconds)

    def tensors(self) -> dict[str, Any]:
        """Return the live tensors, by name."""
        return live_tensors(self.model, self.optimizer, self._loss)

    def state(self) -> dict[str, Any]:
        """Return everything else, ready for JSON."""
        return {
            "stage": self.plan.index,
            "step_in_stage": self.step_in_stage,
            "counters": asdict(self.counters),
            "stream": self.stream.state(),
            "schedule": self.scheduler.state_dict(),
            "generation": self.model.generation_config.to_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.step_in_stage = state["step_in_stage"]
        self.counters = Counters(**state["counters"])
        self.stream.load(state["stream"])
        self.scheduler.load_state_dict(state["schedule"])

    def refuse_unless_finite(self, what: str, value: float) -> None:
        """Check a number that a sound run keeps finite.

        Raises:
            ValueError: it is not.
        """
        if not math.isfinite(value):
            peak = self.plan.spec.schedule.peak
            raise ValueError(
                f"stage {self.plan.spec.name!r}, after step {self.step_in_stage} of "
                f"{self.plan.steps}: {what} is {value}; lower schedule.peak ({peak:g}) or warm up "
                "longer; the checkpoint before is kept"
            )

    def _backward(self, batch: PackedBatch) -> float:
        loss = self._loss(self.model, batch, step=self.step_in_stage)
        loss.backward()
        return loss.item()

    def _flops(self, lengths: list[int]) -> int:
        size = {"tokens": sum(lengths), "pairs": causal_pairs(lengths)}
        taught = self._loss.needs_teacher(self.step_in_stage)
        return self.plan.flops_of(**size, taught=taught)


def live_tensors(model: PreTrainedModel, optimizer: Optimizer, loss: BatchLoss) -> dict[str, Any]:
    """Return the live tensors of a stage, by name: to be saved, or to be read into."""
    return {
        "model": model_tensors(model),
        "optimizer": moments(model, optimizer),
        **loss.tensors(),
    }
