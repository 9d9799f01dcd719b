"""One line for every mistake in a recipe: where it is, what it is, what was expected."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

Location = tuple[str | int, ...]

_EXPECTATIONS = {
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "string_type": "expected text",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "dict_type": "expected a mapping",
    "model_type": "expected a mapping",
    "model_attributes_type": "expected a mapping",
    "finite_number": "expected a finite number",
    "too_short": "should not be empty",
    "string_too_short": "should not be empty",
    "string_pattern_mismatch": "expected a name: a letter, then letters, digits, - and _",
}


class RecipeError(ValueError):
    """A mistake at a location, relative to the model whose validator found it."""

    def __init__(self, location: Location, message: str) -> None:
        super().__init__(message)
        self.location = location


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return the closest of the known names as a question, or the list of them."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    # a list longer than a screen line helps nobody
    return f"known: {', '.join(names)}" if len(names) <= 20 else f"{len(names)} names are known"


def unknown_key(name: object, known: Iterable[str]) -> RecipeError:
    """Return the error of a key that no field has."""
    return RecipeError((str(name),), f"unknown key; {did_you_mean(name, known)}")


def describe(error: Mapping[str, Any]) -> tuple[Location, str]:
    """Return the place and the text of one of pydantic's errors, in our words."""
    # pydantic marks an error of a mapping's key, rather than of its value
    location = tuple(part for part in error["loc"] if part != "[key]")
    kind, context = error["type"], error.get("ctx", {})
    cause = context.get("error")
    if cause is not None:
        return location + getattr(cause, "location", ()), str(cause)
    if kind == "missing":
        return location, "missing key"
    if kind == "union_tag_not_found":
        return (*location, _tag_name(context)), "missing key"
    if kind == "union_tag_invalid":
        known = re.findall(r"'([^']+)'", context["expected_tags"])
        return (*location, _tag_name(context)), _unknown_value(context["tag"], known)
    if kind == "literal_error":
        return location, _unknown_value(error["input"], re.findall(r"'([^']+)'", error["msg"]))
    return location, f"{_expectation(error)}, got {shorten(error['input'])}"


def shorten(value: object) -> str:
    """Return a value's text, cut to fit into a line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def dotted(location: Location) -> str:
    """Return a location as it is written: stages[1].model."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def _tag_name(context: Mapping[str, Any]) -> str:
    return context["discriminator"].strip("'")


def _unknown_value(value: object, known: Iterable[str]) -> str:
    return f"unknown value {shorten(value)}; {did_you_mean(value, known)}"


def _expectation(error: Mapping[str, Any]) -> str:
    if error["type"] in _EXPECTATIONS:
        return _EXPECTATIONS[error["type"]]
    # "Input should be greater than 0" and the like read well enough after this
    return re.sub(r"^[A-Z][a-z]+ should ", "should ", error["msg"])
