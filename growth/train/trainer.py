"""Runs the stages of a recipe, leaving records and checkpoints behind.

A checkpoint lies between two steps. What is written to the record after it is cut off when it is
resumed and written again, so evaluations come where a resumed run passes them a second time.
"""

import time
from pathlib import Path
from typing import Any

import torch

from ..sparse.files import refresh
from .checkpoint import checkpoint_path, load_tensors, read_state, save_checkpoint
from .data.packing import BatchStream
from .directory import RunDirectory
from .environment import default_device, package_versions
from .evaluate import evaluate
from .inputs import Inputs
from .interrupts import Interrupted, Interrupts
from .model import empty_model, first_model, save_model
from .objective import BatchLoss
from .outline import StagePlan
from .recipe.schema import Recipe
from .results.console import Console, Progress, say
from .results.metrics import Metrics, read_metrics, truncate_metrics
from .results.summary import final_record, summarise
from .rng import get_rng, seed_of_stage, set_rng
from .selection import selector
from .stage import Counters, StageState, StepResult, live_tensors
from .teacher import Teacher, empty_teacher, first_teacher


class Trainer:
    """One run of a recipe in one directory.

    Args:
        evaluate_every: steps between evaluations within a stage; None for none.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        inputs: Inputs,
        plans: list[StagePlan],
        directory: RunDirectory,
        console: Console,
        interrupts: Interrupts,
        evaluate_every: int | None = None,
    ) -> None:
        self._recipe, self._inputs, self._plans = recipe, inputs, plans
        self._directory, self._console, self._interrupts = directory, console, interrupts
        self._evaluate_every = evaluate_every
        self._device = default_device()

    def run(self, checkpoint: Path | None) -> None:
        """Train from a checkpoint, or from the start, to the end.

        Raises:
            SystemExit: a signal asked for the end; a checkpoint was written.
            ValueError: the loss is not finite, or the checkpoint does not fit to the data.
        """
        state = read_state(checkpoint) if checkpoint else None
        if state:
            self._inputs.check(state["data"])
        truncate_metrics(self._directory.metrics, state["metrics_bytes"] if state else 0)
        self._metrics = Metrics(self._directory.metrics)
        try:
            stage = self._restore(checkpoint, state) if checkpoint and state else self._start()
            self._run(stage)
        finally:
            self._metrics.close()

    def _run(self, stage: StageState) -> None:
        self._console.start(self._work(stage))
        try:
            for plan in self._plans[stage.plan.index :]:
                if plan.index > stage.plan.index:
                    stage = self._begin(plan, stage)
                self._train(stage)
        except Interrupted as request:
            self._stop(stage, request)
        records = read_metrics(self._directory.metrics)
        self._metrics.write(final_record(summarise(records)))
        self._metrics.sync()
        save_model(stage.model, self._inputs.tokenizer, self._directory.model)

    def _start(self) -> StageState:
        self._metrics.write(
            {
                "kind": "start",
                "name": self._recipe.name,
                "data": self._inputs.description,
                "environment": {
                    "device": str(self._device),
                    "threads": torch.get_num_threads(),
                    "versions": package_versions(),
                },
            }
        )
        stage = self._begin(self._plans[0], None)
        self._save(stage)
        return stage

    def _begin(self, plan: StagePlan, before: StageState | None) -> StageState:
        torch.manual_seed(seed_of_stage(self._recipe.seed, plan.index))
        previous = (before.model, before.optimizer) if before else None
        model, optimizer, made = first_model(plan, previous, device=self._device)
        teacher = first_teacher(plan, previous[0] if previous else None, model)
        stream = self._stream(plan, teacher)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self._metrics.write(
            {
                "kind": "stage",
                "stage": plan.spec.name,
                "steps": plan.steps,
                "parameters": parameters,
                "sources": {name: share for name, share in plan.spec.data.items() if share},
                "made": made,
            }
        )
        counters = before.counters if before else Counters()
        loss = BatchLoss(plan.spec, model, steps=plan.steps, teacher=teacher)
        return StageState(plan, model, optimizer, stream, counters, loss)

    def _stream(self, plan: StagePlan, teacher: Teacher | None) -> BatchStream:
        seed = seed_of_stage(self._recipe.seed, plan.index)
        return self._inputs.stream(plan.spec, seed=seed, choose=selector(plan.spec, teacher))

    def _restore(self, path: Path, state: dict[str, Any]) -> StageState:
        plan = self._plans[state["stage"]]
        model, optimizer = empty_model(plan, state["generation"], device=self._device)
        teacher = empty_teacher(plan, device=self._device)
        loss = BatchLoss(plan.spec, model, steps=plan.steps, teacher=teacher)
        tensors = live_tensors(model, optimizer, loss) | {"rng": get_rng()}
        load_tensors(path, tensors)
        refresh(model)
        if teacher:
            refresh(teacher.model)
        set_rng(tensors["rng"])
        stream = self._stream(plan, teacher)
        stage = StageState(plan, model, optimizer, stream, Counters(), loss)
        stage.load_state(state)
        say(f"resuming from {path}: stage {plan.spec.name}, step {stage.step_in_stage}")
        return stage

    def _train(self, stage: StageState) -> None:
        while stage.step_in_stage < stage.plan.steps:
            self._interrupts.check()
            # nothing may come between an evaluation and its step: it would be written twice
            if stage.step_in_stage == 0:
                self._evaluate(stage, "before")
            elif self._evaluate_every and stage.step_in_stage % self._evaluate_every == 0:
                self._evaluate(stage, "during")
            self._after_step(stage, stage.step())
        self._evaluate(stage, "after")

    def _after_step(self, stage: StageState, result: StepResult) -> None:
        step, last = stage.step_in_stage, stage.step_in_stage == stage.plan.steps
        self._console.step(
            Progress(
                stage=stage.plan.spec.name,
                step=step,
                steps=stage.plan.steps,
                work=self._work(stage),
                loss=result.loss,
                tokens_per_second=result.tokens_per_second,
            )
        )
        if last or step % self._recipe.log_every == 0:
            self._metrics.write(
                self._position("train", stage)
                | {"lr": result.lr, "grad_norm": result.grad_norm}
                | stage.counters.close_window()
            )
        if last or step % self._recipe.checkpoint_every == 0:
            self._save(stage)

    def _evaluate(self, stage: StageState, when: str) -> None:
        start = time.perf_counter()
        self._console.doing(f"{stage.plan.spec.name}: evaluating")
        record = self._position("eval", stage) | {"when": when}
        for name, text in self._inputs.held_out(stage.plan.spec).items():
            loss = evaluate(
                stage.model, text, packed=stage.plan.spec.kernels, check=self._interrupts.check
            )
            stage.refuse_unless_finite(f"the held-out loss on {name}", loss.nats_per_token)
            record[f"loss/{name}"] = loss.nats_per_token
            record[f"bits_per_byte/{name}"] = loss.bits_per_byte
        self._metrics.write(record | {"seconds": time.perf_counter() - start})

    def _save(self, stage: StageState) -> None:
        state = stage.state() | {
            "recipe": self._recipe.resolved(),
            "digest": self._recipe.digest(),
            "data": self._inputs.description,
            "metrics_bytes": self._metrics.sync(),
        }
        save_checkpoint(
            self._directory.steps,
            step=stage.counters.step,
            tensors=stage.tensors() | {"rng": get_rng()},
            state=state,
            config=stage.plan.config.to_json_string(),
        )

    def _stop(self, stage: StageState, request: Interrupted) -> None:
        step = stage.counters.step
        if not checkpoint_path(self._directory.steps, step).exists():
            self._save(stage)
        root = self._directory.root
        say(
            f"stopped by {request} after step {step}; go on with: "
            f"apical train {self._directory.recipe} --resume --output {root}"
        )
        raise SystemExit(request.exit_code)

    def _position(self, kind: str, stage: StageState) -> dict[str, Any]:
        counters = stage.counters
        return {
            "kind": kind,
            "stage": stage.plan.spec.name,
            "step": counters.step,
            "tokens": counters.tokens,
            "flops": counters.flops,
        }

    def _work(self, stage: StageState) -> int:
        """Return how much of the planned work is done, in FLOPs."""
        done = sum(plan.flops for plan in self._plans[: stage.plan.index])
        return done + stage.plan.flops * stage.step_in_stage // stage.plan.steps
