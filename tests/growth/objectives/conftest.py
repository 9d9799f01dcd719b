"""A head with all that heads have, and the plain losses of its logits in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"linear_bias": True},
    # Gemma's cap, Cohere's scale; the cap small enough to bend these logits
    "bias, cap and scale": {"linear_bias": True, "softcap": 3.0, "logit_scale": 0.5},
}


class Case:
    """Hidden states (T, H), a head (V, H) and labels (T,), all leaves in float64."""

    def __init__(self, *, tokens: int, options: dict[str, Any], vocabulary: int = 13) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.hidden = normal(tokens, 5).requires_grad_()
        self.weight = normal(vocabulary, 5).requires_grad_()
        self.target = torch.randint(vocabulary, (tokens,), generator=draw)
        # every fourth token has no label
        self.target[::4] = -100
        self.options = dict(options)
        if "linear_bias" in options:
            self.options["linear_bias"] = normal(vocabulary).requires_grad_()
        self.leaves = [self.hidden, self.weight]
        if "linear_bias" in options:
            self.leaves.append(self.options["linear_bias"])
        self.teacher = normal(tokens, 5), normal(vocabulary, 5)

    @property
    def valid(self) -> Tensor:
        return self.target != -100

    def logits(self) -> Tensor:
        bias = self.options.get("linear_bias", 0)
        scaled = (self.hidden @ self.weight.T + bias) * self.options.get("logit_scale", 1.0)
        cap = self.options.get("softcap")
        return cap * torch.tanh(scaled / cap) if cap else scaled

    def nll(self) -> Tensor:
        return -self.logits().log_softmax(-1).gather(1, self.target.clamp(min=0)[:, None])[:, 0]

    def squared_lse(self) -> Tensor:
        return self.logits().logsumexp(-1).square()

    def assert_same(self, loss: Tensor, expected: Tensor) -> None:
        """Compare two losses and the gradients of all leaves."""
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
        grads = torch.autograd.grad(loss, self.leaves)
        truth = torch.autograd.grad(expected, self.leaves)
        for found, wanted in zip(grads, truth, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.fixture(params=HEADS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return HEADS[request.param]


@pytest.fixture
def case(options: dict[str, Any]) -> Case:
    return Case(tokens=23, options=options)
