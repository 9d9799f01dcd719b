"""The Z-loss of de Brébisson and Vincent without logits against the same with all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from race import Call, Case, Lineup, Outputs, Peer
from torch import Tensor

from apical import linear_cross_entropy
from apical.kernels.spherical_loss import spherical_loss, standardized_loss

# largest error of loss or gradient, relative to its norm: plain PyTorch's at that dtype, with room
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
# the loss's two parameters; its cost does not depend on them
_A, _B = 0.1, 10.0
# rows of logits at a time in the truth
_CHUNK = 256

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    """The inputs of one case; input and linear_weight require grad."""

    input: Tensor  # (T, H)
    linear_weight: Tensor  # (V, H)
    target: Tensor  # (T,)


def test_spherical_loss(case: Case, race: Callable[[Lineup], object]) -> None:
    race(case.build())


def cases(*, quick: bool, device: str) -> list[Case]:
    """Return the races: tokens, width, vocabulary, dtype."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        table = [(96, 32, 1024, fp32), (96, 32, 1024, bf16)]
    elif device == "cuda":
        table = [(8192, 2048, 128256, bf16)]
    else:
        table = [(2048, 256, 49152, fp32), (2048, 576, 49152, fp32), (2048, 256, 49152, bf16)]
    return [_case(*row, device=device) for row in table]


def _case(T: int, H: int, V: int, dtype: torch.dtype, *, device: str) -> Case:
    def build() -> Lineup:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(T, H, generator=generator).to(device, dtype).requires_grad_()
        weight = torch.randn(V, H, generator=generator).mul_(H**-0.5).to(device, dtype)
        target = torch.randint(V, (T,), generator=generator).to(device)
        return _lineup(Inputs(hidden, weight.requires_grad_(), target))

    return Case(f"{str(dtype).removeprefix('torch.')}-H{H}-V{V}", build)


def _lineup(x: Inputs) -> Lineup:
    (T, H), V = x.input.shape, len(x.linear_weight)
    dtype = str(x.input.dtype).removeprefix("torch.")
    return Lineup(
        ours=_timed(_ours, x),
        peers={"all logits": _timed(_plain, x), "all logits, centred": _timed(_centred, x)}
        # what it would replace: another loss, so nothing is compared
        | {"our linear_cross_entropy, another loss": Peer(_timed(_cross_entropy, x), limit=True)},
        what=f"{T} tokens, width {H}, vocabulary {V}; {dtype}; mean loss and both gradients.",
        truth=lambda: _exact(x),
        tolerance=_TOLERANCE[x.input.dtype],
        flops=4 * V * H**2 + 4 * T * H**2,
        dtype=dtype,
    )


def _timed(loss: Loss, x: Inputs) -> Call:
    """Return the call to time: the loss and both gradients."""

    def call() -> Outputs:
        value = loss(x.input, x.linear_weight, x.target)
        return (value.detach(), *torch.autograd.grad(value, (x.input, x.linear_weight)))

    return call


def _ours(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    loss = partial(standardized_loss, sharpness=_A, location=_B)
    return spherical_loss(hidden, weight, target, loss)


def _plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    # as the paper writes it: the square of the mean from the mean of the squares
    o = F.linear(hidden, weight).float()
    mean = o.mean(1)
    sigma = (o.square().mean(1) - mean.square()).sqrt()
    return _softplus((o.gather(1, target[:, None]).squeeze(1) - mean) / sigma).mean()


def _centred(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    o = F.linear(hidden, weight).float()
    variance, mean = torch.var_mean(o, 1, correction=0)
    return _softplus((o.gather(1, target[:, None]).squeeze(1) - mean) / variance.sqrt()).mean()


def _softplus(z: Tensor) -> Tensor:
    return F.softplus(_A * (_B - z)) / _A


def _cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, target).loss


def _exact(x: Inputs) -> Outputs:
    """Return loss and gradients in float64, a chunk of logits at a time."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (x.input, x.linear_weight))
    total = hidden.new_zeros(())
    for rows in torch.arange(len(hidden), device=hidden.device).split(_CHUNK):
        part = _centred_exact(hidden[rows], weight, x.target[rows]) / len(hidden)
        part.backward()
        total += part.detach()
    assert hidden.grad is not None
    assert weight.grad is not None
    return total, hidden.grad, weight.grad


def _centred_exact(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    o = hidden @ weight.t()
    variance, mean = torch.var_mean(o, 1, correction=0)
    return _softplus((o.gather(1, target[:, None]).squeeze(1) - mean) / variance.sqrt()).sum()
