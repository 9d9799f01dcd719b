"""Fits the linear map of a growth operator on the loss of the grown model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from apical._extras import require

from ..apply import _skeleton, as_tied
from ..mapping import Mapper
from ..plan import GrowthPlan, Operator
from ..spaces import architecture_of, check_tensors
from ..spaces.naming import Naming, shape_at
from .parameters import Learnable, settled
from .start import start_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]


def fit_growth(
    model: PreTrainedModel,
    start: Operator | Sequence[Operator],
    batches: Iterable[Batch],
    *,
    steps: int = 100,
    lr: float = 0.03,
    noise: float = 0.03,
    seed: int = 0,
) -> GrowthPlan:
    """Return the plan of a linear map of the model's weights, fitted on the grown model's loss.

    Every new weight is E_out W E_in^T, summed over the old layers with learned weights. There is
    one matrix per space that `start` widens, shared by all layers, and one of new by old layers per
    name within a layer if `start` deepens. The old weights stay as they are. Grow with
    `apical.grow(model, apical.Learned(plan))`.

    Memory: the old and the grown weights, two or three times the latter for their gradients, and
    one batch; all but the plan is freed. Determinism: as the model's own, by `seed`.

    Args:
        model: a transformers model with a loss, its weights in memory; used without dropout.
        start: the known operators to start from: one, or one that deepens and others that widen by
            copies, for example `[Stack(2), Widen(2)]`.
        batches: arguments of the model with `labels`, one mapping per step; from the first again
            when they end.
        steps: of AdamW without decay, gradients clipped to norm 1; the rate falls to 0 linearly.
        lr: by how much a step changes a row of a matrix, relative to the row of a copy.
        noise: of the matrices at first, likewise; without, copies stay copies.
        seed: of the noise.

    Raises:
        ValueError: an option is out of range, there are no batches, a batch has no labels, the loss
            is not finite, or `start` does not fit.
        NotImplementedError: the model's family has no table in growth/spaces.
        ImportError: transformers is not installed.

    Source: LiGO, Wang et al. 2023, arXiv 2303.00980; see docs/growth.md for what differs.
    """
    if steps < 1 or lr <= 0 or noise < 0:
        raise ValueError(
            f"steps={steps}, lr={lr}, noise={noise}; expected steps of at least 1, lr above 0 and "
            "noise of at least 0"
        )
    old = _Old.of(model)
    plan = start_plan(start, old.config)
    grown = _Grown(old, plan)
    with torch.device(model.device):
        learnable = Learnable(plan, old.naming.table, old.places, noise=noise, seed=seed)
    if not learnable.parameters():
        raise ValueError("start changes nothing to be learned; expected more layers or copies")
    losses = _fit(grown, learnable, _repeated(batches, steps), steps, lr)
    options = {"start": _described(start), "steps": steps, "lr": lr, "noise": noise, "seed": seed}
    note = f"fitted on data: loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last"
    return replace(
        settled(learnable), operator="learned", options=options, preserves_function=False,
        notes=(note,),
    )  # fmt: skip


@dataclass(frozen=True)
class _Old:
    """The model before it grows.

    Args:
        live: name in memory -> weight.
        places: stock name -> where it lies.
    """

    model: PreTrainedModel
    config: dict[str, Any]
    naming: Naming
    live: dict[str, Tensor]
    places: dict[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Old:
        transformers = require("transformers", extra="hf", what="apical.fit_growth")
        if not isinstance(model, transformers.PreTrainedModel):
            raise ValueError(f"model is a {type(model).__name__}; expected a transformers model")
        live = {name: parameter.detach() for name, parameter in model.named_parameters()}
        if any(parameter.is_meta for parameter in live.values()):
            raise ValueError("model has weights on the meta device; expected all of them in memory")
        config = model.config.to_dict()
        naming = Naming.of(architecture_of(config), live)
        places = naming.places({name: tensor.shape for name, tensor in live.items()})
        config = as_tied(naming.table, config, places)
        shapes = {whole: shape_at(place, live[place.name].shape) for whole, place in places.items()}
        check_tensors(config, shapes, head=naming.whole_model)
        return cls(model, config, naming, live, places)

    def read(self, whole: str) -> Tensor:
        place = self.places[whole]
        return place.of(self.live[place.name])


class _Grown:
    """The grown model, whose weights a plan computes anew for every batch."""

    def __init__(self, old: _Old, plan: GrowthPlan) -> None:
        self._old = old
        self._model = _skeleton(old.model, plan).eval()
        if old.config.get("tie_word_embeddings"):
            self._model.tie_weights()
        if getattr(self._model.config, "use_cache", False):
            self._model.config.use_cache = False
        there, naming = set(plan.names(old.places)), old.naming
        self._shapes = {
            name: parameter.shape
            for name, parameter in self._model.named_parameters(remove_duplicate=False)
            if naming.wholes(name, parameter.shape)[0][0] in there
        }

    def weights(self, plan: GrowthPlan) -> dict[str, Tensor]:
        """Return name in memory -> weight; gradients go through them to the plan's."""
        # maps are made where the weights are
        with torch.device(self._old.model.device):
            mapper = Mapper(plan, self._old.config)
            return {name: self._weight(mapper, name, shape) for name, shape in self._shapes.items()}

    def _weight(self, mapper: Mapper, name: str, shape: torch.Size) -> Tensor:
        wholes = self._old.naming.wholes(name, shape)
        made = [mapper.tensor(whole, self._old.read) for whole, _ in wholes]
        place = wholes[0][1]
        if place.expert is None:
            return made[0]
        # experts lie one after the other, each with its parts
        count = range(0, len(made), place.parts)
        return torch.stack([torch.cat(made[at : at + place.parts]) for at in count])

    def loss(self, plan: GrowthPlan, batch: Batch) -> Tensor:
        """Return the loss of the model that the plan makes."""
        device = self._old.model.device
        inputs = {name: value.to(device) for name, value in batch.items()}
        output = functional_call(self._model, self.weights(plan), (), inputs)
        if getattr(output, "loss", None) is None:
            raise ValueError(
                f"a batch of {', '.join(batch)} gives no loss; expected one with labels"
            )
        return output.loss


def _fit(
    grown: _Grown, learnable: Learnable, batches: Iterable[Batch], steps: int, lr: float
) -> list[float]:
    parameters = learnable.parameters()
    # one step changes a row by about lr, however long it is
    groups = [{"params": [p], "lr": lr / math.sqrt(p.shape[1])} for p in parameters]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for step, batch in enumerate(batches):
        loss = grown.loss(learnable.plan(), batch)
        losses.append(loss.item())
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {losses[-1]} at step {step}; choose lr below {lr}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _MOST_NORM)
        optimizer.step()
        schedule.step()
    return losses


_MOST_NORM = 1.0  # the default of the authors' code


def _repeated(batches: Iterable[Batch], steps: int) -> Iterable[Batch]:
    found = itertools.islice(itertools.cycle(batches), steps)
    first = next(found, None)
    if first is None:
        raise ValueError("batches is empty; expected at least one batch with labels")
    return itertools.chain([first], found)


def _described(start: Operator | Sequence[Operator]) -> list[str]:
    operators = start if isinstance(start, Sequence) else [start]
    return [repr(operator) for operator in operators]
