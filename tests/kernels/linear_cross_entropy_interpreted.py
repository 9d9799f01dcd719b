"""Inputs and small tiles for the Triton kernels of the loss under the interpreter."""

import os
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor

from apical.kernels.linear_cross_entropy import (
    _triton_backward,
    _triton_exponentials,
    _triton_forward,
    _triton_launch,
    _triton_launch_rows,
    _triton_products,
)
from apical.kernels.linear_cross_entropy._triton_tiles import Configuration

from .linear_cross_entropy_definition import Inputs

INTERPRETED = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
    ),
    pytest.mark.usefixtures("one_thread"),
]

# rows that end inside a tile, more than one of them; classes and hidden size that fill no block
T, H, V = 50, 24, 45
# bfloat16 stores 8 bits of an exponential and of x times its factor. the interpreter cuts them off,
# a GPU rounds, which is half of the error
STORED = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True, params=["pointer", "tma"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of which even these shapes have several, in both ways to load."""

    def only(*_: object, tma: bool, **__: object) -> list[Configuration]:
        return [Configuration(tma and request.param == "tma", 32, 32, 16, 4, 2)]

    for module in (_triton_launch, _triton_launch_rows, _triton_forward):
        monkeypatch.setattr(module, "ROWS", 32)
    for module in (_triton_exponentials, _triton_products):
        monkeypatch.setattr(module, "configurations", only)
    # two chunks of rows, two blocks of classes
    monkeypatch.setattr(_triton_forward, "_CHUNK_BYTES", 0)
    monkeypatch.setattr(_triton_forward, "_CHUNK_ROWS", 32)
    monkeypatch.setattr(_triton_backward, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(_triton_backward, "_BLOCK_CLASSES", 32)
    monkeypatch.setattr(_triton_backward, "_BLOCK_STEP", 32)
    monkeypatch.setattr(_triton_backward, "_UPDATE_ROWS", 30)


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies bits of bfloat16 as integers (Triton 3.6 and 3.9): widen them."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.data.dtype != np.uint16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return plain(self, widened(a), widened(b), d, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


def case(
    *,
    tokens: int = T,
    classes: int = V,
    hidden: int = H,
    labels: int = 1,
    ignored: float = 0.3,
    spread: float = 1.0,
    bias: bool = False,
    weighted: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    token_weight = torch.rand(tokens) + 0.5
    token_weight[torch.rand(tokens) < ignored] = 0.0
    return Inputs(
        torch.randn(tokens, hidden).to(dtype),
        (torch.randn(classes, hidden) * spread * hidden**-0.5).to(dtype),
        torch.randn(classes).to(dtype) if bias else None,
        torch.randint(0, classes, (tokens, labels)),
        torch.rand(tokens, labels),
        torch.rand(classes) if weighted else None,
        token_weight,
    )


def relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
