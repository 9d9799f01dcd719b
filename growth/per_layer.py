"""Optimizer steps inside the backward pass: each gradient is freed as soon as it is used."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

Factory = Callable[[list[dict[str, Any]]], Optimizer]


class PerLayerOptimizer(Optimizer):
    """Steps a parameter in the backward pass, so that not all gradients exist at once.

    Loops, schedules, and checkpoints use it as any optimizer: ``param_groups`` is what a schedule
    changes, and ``step`` only takes the steps that are still due. The result is that of the inner
    optimizer alone. What needs every gradient before any step cannot be had: clip each parameter
    in a hook of your own, or not at all.

    Args:
        groups: parameter groups, as any torch optimizer takes them.
        make: returns the inner optimizer of such groups, e.g.
            ``lambda groups: torch.optim.AdamW(groups, lr=1e-3)``.
        accumulation: backward passes whose gradients are summed before a step. Fewer are as many
            as there were when ``step`` is called.

    Raises:
        ValueError: accumulation is below 1, or a group is empty.

    Source: Lv et al. 2023 (LOMO, arXiv 2306.09782); Zhao et al. 2024 (GaLore, arXiv 2403.03507).
    """

    def __init__(
        self, groups: list[dict[str, Any]], make: Factory, *, accumulation: int = 1
    ) -> None:
        if accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, got {accumulation}")
        groups = [dict(group, params=list(group["params"])) for group in groups]
        if not all(group["params"] for group in groups):
            raise ValueError("a parameter group is empty; leave it out")
        self.accumulation = accumulation
        self._inner: dict[Parameter, Optimizer] = {}
        self._group: dict[Parameter, int] = {}
        self._passes: dict[Parameter, int] = {}
        self._norms: list[Tensor] = []
        for index, group in enumerate(groups):
            for parameter in group["params"]:
                self._inner[parameter] = make([dict(group, params=[parameter])])
                self._group[parameter] = index
        # the inner optimizers say what a group holds
        whole = [
            dict(self._options(group["params"][0]), params=group["params"]) for group in groups
        ]
        super().__init__(whole, {})
        for inner in self._inner.values():
            self.state.update(inner.state)
        self._share_state()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._after_backward)
            for parameter in self._inner
            if parameter.requires_grad
        ]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take the steps of parameters whose gradients came from fewer backward passes.

        Raises:
            ValueError: a closure is given; the backward pass takes the steps.
        """
        if closure is not None:
            raise ValueError("a per-layer optimizer takes no closure; call backward, then step()")
        for parameter in self._inner:
            if parameter.grad is not None:
                self._update(parameter)
        return None

    def pop_grad_norm(self) -> Tensor:
        """Return the norm over all gradients since the last call, a float32 scalar."""
        norms, self._norms = self._norms, []
        return torch.stack(norms).norm() if norms else torch.zeros(())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        super().load_state_dict(state_dict)
        self._share_state()

    def remove(self) -> None:
        """Take the hooks off the parameters: later backward passes leave gradients as usual."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _options(self, parameter: Parameter) -> dict[str, Any]:
        return self._inner[parameter].param_groups[0]

    def _share_state(self) -> None:
        for inner in self._inner.values():
            inner.state = self.state

    def _after_backward(self, parameter: Tensor) -> None:
        assert isinstance(parameter, Parameter)
        passes = self._passes.get(parameter, 0) + 1
        self._passes[parameter] = passes
        if passes == self.accumulation:
            self._update(parameter)

    def _update(self, parameter: Parameter) -> None:
        inner, gradient = self._inner[parameter], parameter.grad
        assert gradient is not None
        self._norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))
        group = self.param_groups[self._group[parameter]]
        self._options(parameter).update(group, params=[parameter])
        inner.step()
        parameter.grad = None
        self._passes[parameter] = 0
