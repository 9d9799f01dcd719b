"""Optional packages: imported where they are used, missed with one line that says what to do."""

import importlib
from types import ModuleType


def require(module: str, *, extra: str, what: str) -> ModuleType:
    """Import and return an optional module.

    Raises:
        ImportError: the module is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise ImportError(
            f"{what} needs the package {error.name}: pip install 'apical[{extra}]'"
        ) from None
