"""Which weights of its layers a module's code computes with by itself, as its source says."""

import functools
import inspect
import re

from torch import nn

# no values: the weight's type and place
_ASKED = r"(?!\.(?:device|dtype|is_cuda|ndim|shape|size\b))"


def reader_of(model: nn.Module, name: str) -> str | None:
    """Return the class that computes with the weight of its layer `name` by itself, if one does."""
    owner, _, leaf = name.rpartition(".")
    for kind in type(model.get_submodule(owner)).__mro__:
        # torch's own do so where nothing is trained
        if not kind.__module__.startswith("torch.") and re.search(
            rf"\bself\.{re.escape(leaf)}\.weight\b{_ASKED}", _source(kind)
        ):
            return kind.__name__
    return None


@functools.cache
def _source(kind: type) -> str:
    """Return the code of a class's methods but those that give initial values."""
    methods = [
        method
        for name, method in vars(kind).items()
        if inspect.isfunction(method) and not re.search("init|reset", name)
    ]
    try:
        source = "\n".join(map(inspect.getsource, methods))
    except OSError:
        # made in a shell
        return ""
    return re.sub(r"isinstance\([^)]*\)", "", source)
