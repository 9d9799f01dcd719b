"""Chunks of rows: logits, softmax and both gradients of a chunk, before the next one starts."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._common import native

# bytes of float32 logits at a time, and the rows that this may mean: fewer make the matrix
# products slow, more make the softmax pass read from further away (bench/linear_cross_entropy.py)
_CHUNK_BYTES = 48e6
_CHUNK_ROWS = (256, 1024)


def forward(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    z_loss: float,
    input_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return nll, lse (T,) and the float32 gradients of the weighted loss, (0,) if not wanted."""
    T, H = input.shape
    V = linear_weight.shape[0]
    active = token_weight.nonzero().squeeze(1)
    nll, lse = (input.new_zeros(T, dtype=torch.float32) for _ in range(2))
    grad_input = input.new_zeros((T, H) if input_grad else 0, dtype=torch.float32)
    # the first chunk overwrites it, which saves filling it
    new = input.new_empty if len(active) else input.new_zeros
    grad_weight = new((V, H) if weight_grad else 0, dtype=torch.float32)
    # everything else runs in float32: once per call, not once per chunk
    W = linear_weight.float()
    buffer = None
    for rows in _chunks(active, V):
        x = input[rows].float()  # (C, H)
        first = buffer is None
        buffer = x.new_empty(len(rows), V) if buffer is None else buffer
        logits = torch.mm(x, W.t(), out=buffer[: len(rows)])  # (C, V)
        if not (input_grad or weight_grad):
            nll[rows], lse[rows] = _nll(logits, target[rows])
            continue
        nll[rows], lse[rows] = _gradient_(logits, target[rows], token_weight[rows], z_loss)
        if input_grad:
            grad_input[rows] = logits @ W
        if weight_grad:
            grad_weight.addmm_(logits.t(), x, beta=0 if first else 1)
    return nll, lse, grad_input, grad_weight


def _chunks(rows: Tensor, V: int) -> Iterator[Tensor]:
    """Yield the rows in order, in chunks of equal size up to one."""
    low, high = _CHUNK_ROWS
    size = min(max(round(_CHUNK_BYTES / (4 * V)), low), high)
    count = -(-len(rows) // size)
    # the first chunk is the largest: the others reuse its buffer
    yield from rows.tensor_split(count) if count else ()


def _nll(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return nll and lse of each row; the logits are scratch."""
    if _has_native(logits.device):
        return torch.ops.apical.softmax_nll_(logits, target)
    _, _, nll, lse = _softmax_(logits, target)
    return nll.float(), lse.float()


def _gradient_(
    logits: Tensor, target: Tensor, scale: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Turn logits into scale x d (nll + z_loss lse^2) / d logits; return nll and lse."""
    if _has_native(logits.device):
        return torch.ops.apical.softmax_grad_(logits, target, scale, z_loss)
    rest, own, nll, lse = _softmax_(logits, target)
    pull, per_sum = 2 * z_loss * lse, scale / (rest + own)
    logits.mul_(((1 + pull) * per_sum).float()[:, None])
    at_target = (pull * own - rest) * per_sum
    logits.scatter_(1, target[:, None], at_target.float()[:, None])
    return nll.float(), lse.float()


def _softmax_(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn logits into exp(logits - max), 0 at the target.

    Returns, in float64, the sum of that, the target's own exponential, nll and lse. The target is
    kept apart so that neither a small loss nor a small gradient is the rest of 1 - 1.
    """
    column = target[:, None]
    logit = logits.gather(1, column)  # (C, 1)
    logits.scatter_(1, column, float("-inf"))
    top = torch.maximum(logits.amax(1, keepdim=True), logit)
    rest = logits.sub_(top).exp_().sum(1).double()  # (C,)
    below = (logit.double() - top).squeeze(1)
    own = below.exp()
    log_sum = torch.log1p(rest + (own - 1))
    return rest, own, log_sum - below, top.squeeze(1) + log_sum


def _has_native(device: torch.device) -> bool:
    return native.loaded() and torch._C._dispatch_has_kernel_for_dispatch_key(
        "apical::softmax_grad_", device.type.upper()
    )
