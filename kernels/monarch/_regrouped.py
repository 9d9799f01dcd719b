"""The product by torch's batched products in half precision: every factor reads whole rows.

Matrix units (AMX; GPUs without Triton) multiply columns that are a step apart several times slower
than it takes to copy them, so both permutations are copies here.
"""

import torch
from torch import Tensor

from .._common import native


def takes(input: Tensor) -> bool:  # noqa: A002
    """Return whether the tensors are in half precision, and the device multiplies in it."""
    if input.device.type != "cpu":
        return input.dtype in (torch.bfloat16, torch.float16)
    return input.dtype == torch.bfloat16 and native.loaded() and torch.ops.apical.amx_supported()


def forward(
    input: Tensor,  # noqa: A002
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the product (T, n) and, to keep, hidden (T, r j k), in memory as (k, T, r j)."""
    T, combs = len(input), len(second)
    between = input.new_empty(T, *first.shape[:2])
    torch.bmm(_runs(input, first), first.transpose(1, 2), out=between.transpose(0, 1))
    hidden = _combs(between.flatten(1), combs).contiguous()
    if bias is None:
        made = torch.bmm(hidden, second.transpose(1, 2))
    else:
        made = torch.baddbmm(_combs(bias[None], combs), hidden, second.transpose(1, 2))
    output = input.new_empty(T, made.shape[2] * combs)
    _combs(output, combs).copy_(made)
    return output, hidden.view(T, first.shape[:2].numel()) if keep else input.new_empty(0)


def backward(
    grad_output: Tensor,
    input: Tensor,  # noqa: A002
    first: Tensor,
    second: Tensor,
    hidden: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    """Return the gradients of input, first, second and bias, (0,) where not wanted."""
    T, combs = len(input), len(second)
    grads = [input.new_empty(0) for _ in wanted]
    upstream = _combs(grad_output, combs).contiguous()
    if wanted[2]:
        grads[2] = torch.bmm(upstream.transpose(1, 2), hidden.view(combs, T, second.shape[2]))
    if wanted[0] or wanted[1]:
        of_hidden = _by_run(torch.bmm(upstream, second), len(first))
        if wanted[1]:
            grads[1] = torch.bmm(of_hidden.transpose(1, 2), _runs(input, first))
        if wanted[0]:
            grads[0] = torch.empty_like(input, memory_format=torch.contiguous_format)
            torch.bmm(of_hidden, first, out=_runs(grads[0], first))
    if wanted[3]:
        grads[3] = grad_output.sum(0)
    return grads


def _runs(x: Tensor, first: Tensor) -> Tensor:
    """View (T, r s) as (r, T, s)."""
    return x.unflatten(1, (len(first), -1)).transpose(0, 1)


def _by_run(hidden: Tensor, runs: int) -> Tensor:
    """Return (k, T, r j) as (r, T, j k)."""
    return hidden.unflatten(2, (runs, -1)).permute(2, 1, 3, 0).flatten(2)


def _combs(x: Tensor, combs: int) -> Tensor:
    """View (T, p k) as (k, T, p)."""
    return x.unflatten(1, (-1, combs)).permute(2, 0, 1)
