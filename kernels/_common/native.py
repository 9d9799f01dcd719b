"""The C++ (and CUDA) library of this package: loaded once, and its absence explained."""

import functools
from pathlib import Path

import torch

# not resolved: the package is reached through a link, and the library lies beside the package
_PACKAGE = Path(__file__).parents[2]


@functools.cache
def status() -> tuple[bool, str]:
    """Return whether the library is loaded, and where from or why not."""
    found = sorted(_PACKAGE.glob("_C*.so"))
    if not found:
        return False, "not built; run `python setup.py build_ext --inplace` (or `make build`)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return False, f"{found[0].name} does not load: {str(error).splitlines()[0]}"
    return True, found[0].name


def loaded() -> bool:
    """Return whether the ops of the library can be called."""
    return status()[0]
