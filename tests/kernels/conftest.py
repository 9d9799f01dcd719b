"""What every kernel is held against: float64, and the error that plain PyTorch makes."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


def _check(actual: Tensor, exact: Tensor, plain: Tensor, what: str) -> None:
    assert actual.shape == exact.shape == plain.shape, f"{what}: {tuple(actual.shape)}"
    assert exact.dtype == torch.float64, f"{what}: the truth must be float64"
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype} against {plain.dtype}"
    if not exact.numel():
        return
    actual, exact, plain, eps = (
        actual.detach().double(),
        exact.detach(),
        plain.detach().double(),
        torch.finfo(actual.dtype).eps,
    )
    error = (actual - exact).abs().max()
    budget = 2 * (plain - exact).abs().max() + eps * exact.abs().max()
    # written so that a nan anywhere fails
    assert bool(error <= budget), f"{what}: error {error:.2e} > {budget:.2e}"


@pytest.fixture
def check_error() -> Callable[[Tensor, Tensor, Tensor, str], None]:
    """``check_error(actual, exact, plain, what)``: error <= 2 x plain PyTorch's + one rounding."""
    return _check


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for small shapes: on busy cores, threads that wait for each other take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
