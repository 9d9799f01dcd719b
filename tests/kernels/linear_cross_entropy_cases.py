"""The loss as a user would define it, with whole logits and dense labels; inputs to hold it to."""

import importlib
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from apical import LinearCrossEntropyOutput, linear_cross_entropy

labelled_rows = importlib.import_module("apical.kernels._common.labelled_rows")
passes = importlib.import_module("apical.kernels.linear_cross_entropy._passes")

IGNORE = -100
CPU = torch.device("cpu")
PASSES = ("native", "torch")


def force(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take one of the passes over a chunk: the C++ library's, or that of machines without it."""
    if name == "torch":
        monkeypatch.setattr(passes, "_has_native", lambda device: False)
    elif not passes._has_native(CPU):
        pytest.skip("the C++ library is not built")


def leaf(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor.detach().to(dtype).clone().requires_grad_()


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def sample(T: int, V: int, H: int = 24, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    target = torch.randint(0, V, (T,))
    target[torch.rand(T) < ignored] = IGNORE
    return torch.randn(T, H), torch.randn(V, H) * H**-0.5, target


def run(inputs: dict[str, Tensor], options: dict[str, Any]) -> LinearCrossEntropyOutput:
    """Return the fused loss."""
    return linear_cross_entropy(**inputs, **options)


def exactly(inputs: dict[str, Tensor], options: dict[str, Any]) -> LinearCrossEntropyOutput:
    """Return the definition in the precision of the inputs."""
    return definition(**inputs, **options)


def definition(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    num_items: float | None = None,
    soft_ids: Tensor | None = None,
    soft_weights: Tensor | None = None,
) -> LinearCrossEntropyOutput:
    V, labelled = len(linear_weight), target != ignore_index
    each = torch.ones_like(target) if token_weight is None else token_weight
    rows = (labelled & (each != 0)).nonzero().squeeze(1)
    y, classes = target[rows], torch.ones(V) if weight is None else weight
    z = input[rows] @ linear_weight.t()
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    z = logit_scale * (z if linear_bias is None else z + linear_bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    label = torch.zeros_like(z)
    if soft_ids is not None and soft_weights is not None:
        label = label.scatter_add(1, soft_ids[rows], soft_weights[rows].to(z.dtype))
    label = label.scatter_add(1, y[:, None], 1 - label.sum(1, keepdim=True))
    label = classes * ((1 - label_smoothing) * label + label_smoothing / V)
    log_p, lse = z.log_softmax(1), z.logsumexp(1)
    z_part = z_loss * lse.square()
    loss, nll = -(label * log_p).sum(1) + z_part, -log_p.gather(1, y[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    divisor = classes.to(z.dtype)[target[labelled]].sum() if num_items is None else num_items
    divisor = divisor if reduction == "mean" and divisor else 1
    accuracy = (z.argmax(1) == y).to(z.dtype).mean() if len(y) else z.new_zeros(())
    loss, z_part = (each[rows] * part / divisor for part in (loss, z_part))
    everywhere = z.new_zeros(len(target))
    loss, nll, lse, entropy = (everywhere.index_put((rows,), v) for v in (loss, nll, lse, entropy))
    loss = loss if reduction == "none" else loss.sum()
    return LinearCrossEntropyOutput(loss, nll, lse, z_part.sum(), accuracy, entropy)


def random_options(seed: int, T: int, V: int) -> dict[str, Any]:
    """Return a draw of options: each is there half of the time, so pairs and triples occur too."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    soft = draw.choice((1, 5))
    choices = {
        "linear_bias": torch.randn(V, generator=generator),
        "weight": torch.rand(V, generator=generator) + 0.1,
        "label_smoothing": draw.choice((0.1, 0.7)),
        "z_loss": draw.choice((1e-4, 1e-1)),
        "softcap": draw.choice((2.0, 30.0)),
        "logit_scale": draw.choice((0.2, 3.0)),
        # negative, as advantages are; 0 leaves a token out
        "token_weight": torch.randn(T, generator=generator) * (torch.arange(T) % 5 != 0),
        "soft_ids": torch.randint(V, (T, soft), generator=generator),
        "soft_weights": torch.rand(T, soft, generator=generator) / soft,
    }
    kept = {name for name in choices if draw.random() < 0.5} - {"soft_weights"}
    kept |= {"soft_weights"} if "soft_ids" in kept else set()
    options: dict[str, Any] = {name: value for name, value in choices.items() if name in kept}
    options["reduction"] = draw.choice(("mean", "sum", "none"))
    if options["reduction"] == "mean" and draw.random() < 0.5:
        options["num_items"] = draw.choice((7, 2.5))
    return options


def doubled(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with every float tensor in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
