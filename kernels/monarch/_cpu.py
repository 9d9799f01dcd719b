"""The product by torch's batched products, on the CPU and where nothing else is: one small copy.

Blocks of tokens go through both factors while they are in the cache. What is between the factors
lies feature by feature: there both a run's rows and a comb's rows are an even step apart, which is
all that a matrix product needs to read it where it is. A comb of outputs is not: products write it
to a buffer of one block of tokens, and that is copied.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# tokens of a block; 2048 x 2048 in 4 blocks takes as long with 256 and 1024 (one core)
_BLOCK = 512


def forward(
    input: Tensor,  # noqa: A002
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the product (T, n) and, to keep, hidden (T, r j k), each block as (r j k, tokens)."""
    x, right, left = _computed(input, first, second)
    (runs, rows, _), (combs, size, _) = right.shape, left.shape
    output = x.new_empty(len(x), combs * size)
    hidden = x.new_empty(len(x) if keep else min(len(x), _BLOCK), runs * rows)
    buffer = _buffer(output)
    for block in _blocks(x):
        between = _between(hidden[block] if keep else hidden[: len(x[block])], runs)
        made = _pages(buffer, x[block], combs)
        torch.bmm(right, _runs(x[block], runs).transpose(1, 2), out=between)
        read = _by_comb(between, combs).transpose(1, 2)  # (k, tokens, r j)
        if bias is None:
            torch.bmm(read, left.transpose(1, 2), out=made)
        else:
            each = _combs(bias[None].to(x.dtype), combs)
            torch.baddbmm(each, read, left.transpose(1, 2), out=made)
        _combs(output[block], combs).copy_(made)
    kept = hidden if keep else hidden.new_empty(0)
    return output.to(input.dtype), kept.to(input.dtype)


def backward(
    grad_output: Tensor,
    input: Tensor,  # noqa: A002
    first: Tensor,
    second: Tensor,
    hidden: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    """Return the gradients of input, first, second and bias, (0,) where not wanted."""
    grad, x, right, left, hidden = _computed(grad_output, input, first, second, hidden)
    (runs, rows, _), combs = right.shape, len(left)
    sums = zip((x, right, left), wanted, strict=False)
    grads = [t.new_zeros(t.shape if want else (0,)) for t, want in sums]
    buffer, of_hidden = _buffer(grad), _buffer(x.new_empty(len(x), runs * rows))
    for block in _blocks(x) if any(wanted[:3]) else ():
        upstream = _pages(buffer, x[block], combs).copy_(_combs(grad[block], combs))
        if wanted[2]:
            read = _by_comb(_between(hidden[block], runs), combs)
            grads[2].baddbmm_(upstream.transpose(1, 2), read.transpose(1, 2))
        if not any(wanted[:2]):
            continue
        between = _between(of_hidden[: len(x[block])], runs)
        read = left.transpose(1, 2), upstream.transpose(1, 2)
        torch.bmm(*read, out=_by_comb(between, combs))
        if wanted[1]:
            grads[1].baddbmm_(between, _runs(x[block], runs))
        if wanted[0]:
            torch.bmm(between.transpose(1, 2), right, out=_runs(grads[0][block], runs))
    grads.append(grad.sum(0) if wanted[3] else grad.new_empty(0))
    return [part.to(input.dtype) for part in grads]


def _blocks(x: Tensor) -> Iterator[slice]:
    return (slice(t, t + _BLOCK) for t in range(0, len(x), _BLOCK))


def _buffer(x: Tensor) -> Tensor:
    """Return memory for a block of x (T, ...)."""
    return x.new_empty(min(len(x), _BLOCK), x.shape[1])


def _pages(buffer: Tensor, block: Tensor, combs: int) -> Tensor:
    """View memory for that many tokens as (k, tokens, p)."""
    return buffer[: len(block)].view(combs, len(block), -1)


def _combs(x: Tensor, combs: int) -> Tensor:
    """View (tokens, p k) as (k, tokens, p)."""
    return x.unflatten(1, (-1, combs)).permute(2, 0, 1)


def _runs(x: Tensor, runs: int) -> Tensor:
    """View (tokens, r s) as (r, tokens, s)."""
    return x.unflatten(1, (runs, -1)).transpose(0, 1)


def _between(hidden: Tensor, runs: int) -> Tensor:
    """View a block of hidden as (r, j k, tokens)."""
    return hidden.view(runs, -1, len(hidden))


def _by_comb(between: Tensor, combs: int) -> Tensor:
    """View (r, j k, tokens) as (k, r j, tokens)."""
    return between.view(-1, combs, between.shape[2]).transpose(0, 1)


def _computed(*tensors: Tensor) -> list[Tensor]:
    # torch's products of half precision are slower than those of float32 where the unit is missing;
    # the memory format also for one column, of which contiguous() would keep the stride
    return [
        (t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)).float()
        for t in tensors
    ]
