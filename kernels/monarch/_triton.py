"""The product on NVIDIA GPUs by one Triton kernel: permutations are strides, nothing is copied.

In memory hidden is (T, k, r, j): what a run writes and what a comb reads are both rows of j.
"""

import torch
from torch import Tensor

from .._common.triton_device import runs_triton


def takes(input: Tensor) -> bool:  # noqa: A002
    """Return whether the kernel can compute this product."""
    known = input.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and runs_triton(input.device)


def forward(
    input: Tensor,  # noqa: A002
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the product (T, n) and, to keep, hidden (T, r j k)."""
    from ._triton_launch import product

    (combs, size, _), T = second.shape, len(input)
    output = input.new_empty(T, size * combs)
    hidden = input.new_empty(T, first.shape[:2].numel())
    if T:
        by_run = _hidden(hidden, first, combs).permute(2, 0, 1, 3)[:, None]  # (r, 1, T, k, j)
        rows = _rows(first, combs).permute(0, 3, 1, 2)[:, None]  # (r, 1, s, k, j)
        product(by_run, _plain(_runs(input, first)), rows)
        right = _plain(second.transpose(1, 2))
        bias = None if bias is None else bias.contiguous()
        product(_plain(_combs(output, combs)), _plain(_by_comb(hidden, combs)), right, bias)
    return output, hidden if keep else input.new_empty(0)


def backward(
    grad_output: Tensor,
    input: Tensor,  # noqa: A002
    first: Tensor,
    second: Tensor,
    hidden: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    """Return the gradients of input, first, second and bias, (0,) where not wanted."""
    grads = [
        torch.zeros(t.shape if want else (0,), dtype=t.dtype, device=t.device)
        for t, want in zip((input, first, second), wanted, strict=False)
    ]
    grads.append(grad_output.sum(0) if wanted[3] else grad_output.new_empty(0))
    if len(input) and any(wanted[:3]):
        _products(grads, grad_output, input, first, second, hidden)
    return grads


def _products(
    grads: list[Tensor],
    grad_output: Tensor,
    input: Tensor,  # noqa: A002
    first: Tensor,
    second: Tensor,
    hidden: Tensor,
) -> None:
    from ._triton_launch import product

    combs = len(second)
    upstream = _combs(grad_output, combs)  # (k, T, p)
    if grads[2].numel():
        between = _plain(_by_comb(hidden, combs))
        product(_plain(grads[2]), _plain(upstream.transpose(1, 2)), between)
    if not (grads[0].numel() or grads[1].numel()):
        return
    of_hidden = input.new_empty(len(input), first.shape[:2].numel())
    product(_plain(_by_comb(of_hidden, combs)), _plain(upstream), _plain(second))
    by_run = _hidden(of_hidden, first, combs)  # (T, k, r, j)
    if grads[0].numel():
        rows = _rows(first, combs)[:, :, :, None]  # (r, k, j, 1, s)
        left = by_run.permute(2, 0, 1, 3)[:, None]  # (r, 1, T, k, j)
        product(_plain(_runs(grads[0], first)), left, rows)
    if grads[1].numel():
        left = by_run.permute(2, 1, 3, 0)[:, :, :, None]  # (r, k, j, 1, T)
        out = _rows(grads[1], combs)[:, :, :, None]
        product(out, left, _plain(_runs(input, first)))


def _plain(x: Tensor) -> Tensor:
    """View matrices (b, M, N) as the kernel's (b, 1, M, 1, N)."""
    return x[:, None, :, None]


def _runs(x: Tensor, first: Tensor) -> Tensor:
    """View (T, r s) as (r, T, s)."""
    return x.unflatten(1, (len(first), -1)).transpose(0, 1)


def _combs(x: Tensor, combs: int) -> Tensor:
    """View (T, p k) as (k, T, p)."""
    return x.unflatten(1, (-1, combs)).permute(2, 0, 1)


def _rows(first: Tensor, combs: int) -> Tensor:
    """View (r, j k, s) as (r, k, j, s)."""
    return first.unflatten(1, (-1, combs)).transpose(1, 2)


def _hidden(hidden: Tensor, first: Tensor, combs: int) -> Tensor:
    """View (T, k r j) as (T, k, r, j)."""
    return hidden.view(len(hidden), combs, len(first), -1)


def _by_comb(hidden: Tensor, combs: int) -> Tensor:
    """View (T, k r j) as (k, T, r j)."""
    return hidden.view(len(hidden), combs, -1).transpose(0, 1)
