"""Grows the state of an optimizer by the plan that grew its model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .apply import as_tied
from .mapping import Mapper
from .plan import GrowthPlan
from .spaces import architecture_of
from .spaces.naming import Naming, Place

# first moments follow the map of gradients, second moments the squared map
_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


State = Mapping[str, Mapping[str, Any]]


def grow_optimizer(
    plan: GrowthPlan,
    config: Mapping[str, Any],
    state: State,
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, dict[str, Any]]:
    """Return the optimizer state of the grown model, keyed by parameter name.

    First moments are what gradients of the grown model would have given: a copy that is read with
    half the weight gets half the gradient. That is exact for even copies in width, but for keys and
    values that each head now has of its own: they get equal parts of what these shared. New
    directions that are no copies start with moments of 0. A weight that the plan sets to zero, or
    draws, starts anew: zero moments at step 0, so that Adam corrects their bias; every other step
    count is kept. A parameter whose old parameter has no state (frozen, or never used) has none.

    Precision: as `Mapper.tensor`; the result shares no storage with `state`.

    Args:
        plan: the plan that grew the model.
        config: of the model before it grew, as `PreTrainedConfig.to_dict` gives it.
        state: old parameter name -> {"exp_avg", "exp_avg_sq", "step", …}, as torch's AdamW, Adam
            or SGD keep it; tied weights stand under the one name `named_parameters` gives.
        shapes: name -> shape of every parameter of the grown model.

    Raises:
        ValueError: a state of an unknown kind, or one whose shape is not its parameter's.

    Source: ours; the squared map for second moments follows from v being a mean of squares.
    """
    naming = Naming.of(architecture_of(config), shapes)
    experts = naming.table.sizes(config).get("experts", 0)
    places = naming.places(dict.fromkeys(state, (experts,)))
    config = as_tied(naming.table, dict(config), places)
    mappers = {p: Mapper(plan, config, gradient=True, power=p) for p in set(_POWERS.values())}
    grown = {}
    for name, shape in shapes.items():
        source = plan.sources(naming.wholes(name, shape)[0][0])
        if source.terms and all(old in places for old, _ in source.terms):
            first = state[places[source.terms[0][0]].name]
            one = _Growing(naming, places, state, name, tuple(shape), is_new=source.is_new)
            grown[name] = {kind: one.grown(kind, value, mappers) for kind, value in first.items()}
    return grown


@dataclass(frozen=True)
class _Growing:
    """The state of one parameter of the grown model.

    Args:
        naming, places: what the parameters of both models are called; where stock tensors lie.
        state: of the old model.
        name, shape: of the parameter.
        is_new: it has no old values.
    """

    naming: Naming
    places: Mapping[str, Place]
    state: State
    name: str
    shape: tuple[int, ...]
    is_new: bool

    def grown(self, kind: str, first: Any, mappers: Mapping[int, Mapper]) -> Any:
        """Return one kind of state; `first` is that of the first old parameter."""
        if kind == "step":
            count = 0 if self.is_new else int(first)
            return torch.full_like(first, count) if isinstance(first, Tensor) else count
        if kind not in _POWERS:
            raise ValueError(
                f"optimizer state {kind!r} cannot be grown; known: step, {', '.join(_POWERS)}"
            )
        mapper = mappers[_POWERS[kind]]
        moment = self.naming.build(
            self.name, self.shape, lambda whole: mapper.tensor(whole, self._reader(kind))
        )
        _check_shape(kind, self.name, moment, self.shape)
        return moment

    def _reader(self, kind: str) -> Callable[[str], Tensor]:
        return lambda whole: self.places[whole].of(self.state[self.places[whole].name][kind])


def _check_shape(kind: str, name: str, moment: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(moment.shape) != shape:
        raise ValueError(
            f"{kind} of {name} would have shape {tuple(moment.shape)}; "
            f"expected its parameter's {shape}: the state is of another model"
        )
