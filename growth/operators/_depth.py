"""How deep a grown model is, from a factor or a number of layers."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from ..spaces import architecture_of


def depth_of(config: Mapping[str, Any]) -> int:
    """Return how many layers a model with this config has."""
    return config[architecture_of(config).depth_key]


def check_growth(factor: float | None, layers: int | None) -> None:
    """Check how deep the grown model is asked to be.

    Raises:
        ValueError: both are given, or one is none that a growing operator can have.
    """
    if factor is not None and layers is not None:
        raise ValueError(f"factor is {factor} and layers {layers}; expected one of the two")
    number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if factor is not None and not (number and 1 < factor < float("inf")):
        shown = f"{factor:g}" if number else repr(factor)
        raise ValueError(f"factor is {shown}; expected a number above 1")
    check_count("layers", layers, least=2)


def check_count(name: str, value: int | None, *, least: int) -> None:
    """Check an option that counts something.

    Raises:
        ValueError: it is no integer of at least `least`.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")


def deeper(old: int, factor: float | None, layers: int | None) -> int:
    """Return the depth of the grown model: `layers`, or `factor` (2 if neither) times the old one.

    Raises:
        ValueError: it is no integer, or not deeper.
    """
    new = layers if layers is not None else Fraction(str(factor or 2)) * old
    if new != int(new):
        raise ValueError(
            f"factor {factor:g} makes {float(new):g} layers of {old}; expected an integer: "
            "give layers"
        )
    if new <= old:
        raise ValueError(f"layers is {new}, and the model has {old} already; expected more")
    return int(new)
