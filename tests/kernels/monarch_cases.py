"""Inputs of the Monarch product, and what it is by definition."""

from typing import NamedTuple

import torch
from torch import Tensor

# no size is another's, and none fills a tile
PLAIN = {"tokens": 37, "runs": 3, "combs": 4, "rank": 5, "run": 7, "comb": 6}
SHAPES = {
    "ragged": PLAIN,
    "tiny": dict.fromkeys(PLAIN, 1),
    "rank-1": PLAIN | {"rank": 1},
    # both block-diagonal factors are one block: a low-rank matrix
    "one-block": PLAIN | {"runs": 1, "combs": 1},
    "one-run": PLAIN | {"runs": 1},
    "one-comb": PLAIN | {"combs": 1},
    # the matrix is a run, or a comb, of single features
    "single-features": PLAIN | {"run": 1, "comb": 1, "rank": 1},
    "full-tiles": {"tokens": 32, "runs": 4, "combs": 4, "rank": 16, "run": 16, "comb": 32},
    "no-tokens": PLAIN | {"tokens": 0},
}


class Operands(NamedTuple):
    input: Tensor  # (T, r s)
    first: Tensor  # (r, j k, s)
    second: Tensor  # (k, p, r j)
    bias: Tensor | None

    @property
    def out_features(self) -> int:
        return self.second.shape[0] * self.second.shape[1]


def sample(
    *,
    tokens: int = 37,
    runs: int = 3,
    combs: int = 4,
    rank: int = 5,
    run: int = 7,
    comb: int = 6,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Operands:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return Operands(
        normal(tokens, runs * run),
        normal(runs, rank * combs, run),
        normal(combs, comb, runs * rank),
        normal(comb * combs) if bias else None,
    )


def by_hand(first: Tensor, second: Tensor) -> Tensor:
    """Return the matrix (n, m), entry by entry."""
    (runs, rows, run), (combs, comb, _) = first.shape, second.shape
    rank = rows // combs
    weight = first.new_zeros(comb * combs, runs * run)
    for k in range(combs):
        for r in range(runs):
            left = second[k, :, r * rank : (r + 1) * rank]
            weight[k::combs, r * run : (r + 1) * run] = left @ first[r, k::combs]
    return weight


def exact(given: Operands, grad: Tensor) -> list[Tensor]:
    """Return the product and its gradients in float64, on the CPU."""
    leaves = [x.detach().double().requires_grad_() for x in given if x is not None]
    bias = leaves[3] if given.bias is not None else None
    out = torch.nn.functional.linear(leaves[0], by_hand(*leaves[1:3]), bias)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]
