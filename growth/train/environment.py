"""What a run depends on besides its recipe: threads, determinism, versions of packages."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch

_PACKAGES = ("apical", "torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


@contextmanager
def reproducible(*, threads: int | None) -> Iterator[None]:
    """Run the body with deterministic algorithms and so many threads, then restore both."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads or before[0])
    # a GPU has operations without a deterministic form; the promise is for a CPU
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[1])
        torch.set_num_threads(before[0])


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def package_versions() -> dict[str, str]:
    """Return the versions that a run's numbers depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}
