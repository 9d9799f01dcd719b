"""YAML with the line of every key, and `--set key=value` on top of it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import Location, describe, did_you_mean, dotted, shorten

# YAML 1.1 reads 3e-3 as text; everyone who writes it means the number
_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    # anchors save three lines and cost a reader more
    def ignore_aliases(self, data: object) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
# no field is a date; 2026-01-01 stays text
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


@dataclass
class Document:
    """Plain data, and where each part of it was written.

    Args:
        path: of the file, as the user gave it.
        data: what the file says, changed by the overrides.
        lines: of every key and list item, counted from 1.
        overrides: what `--set` wrote, and the key it was given.
    """

    path: str
    data: Any
    lines: dict[Location, int]
    overrides: dict[Location, str] = field(default_factory=dict)

    def place(self, location: Location) -> str:
        """Return the file, line and dotted key of a location, or the `--set` that wrote it."""
        location = _without_tags(self.data, location)
        for path, key in self.overrides.items():
            if location[: len(path)] == path:
                return f"--set {key}{dotted(('', *location[len(path) :]))}"
            if path[: len(location)] == location and location not in self.lines:
                return f"--set {key.rsplit('.', len(path) - len(location))[0]}"
        written = (location[:n] for n in range(len(location), -1, -1))
        line = next(self.lines[above] for above in written if above in self.lines)
        return f"{self.path}:{line}: {dotted(location) or 'recipe'}"

    def first_mistake(self, errors: Sequence[Mapping[str, Any]]) -> str:
        """Return the first of pydantic's errors as a line, with the number of the others."""
        # pydantic also calls a list too short when all its items are wrong
        first, *others = [e for e in errors if e["type"] != "too_short" or not e["input"]]
        location, message = describe(first)
        more = f" (and {len(others)} more)" if others else ""
        return f"{self.place(location)}: {message}{more}"


def read_document(path: Path) -> Document:
    """Return the recipe file's data with line numbers.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, not text, not YAML, or has a key twice.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a directory, expected a recipe (a YAML file)")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such recipe")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        lines: dict[Location, int] = {}
        _note_lines(node, (), lines, ())
        data = yaml.load(text, Loader=_Loader)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text, expected a recipe (YAML)") from None
    except yaml.YAMLError as error:
        raise ValueError(_syntax(path, error)) from None
    if data is None:
        raise ValueError(f"{path}: is empty, expected a recipe with stages")
    return Document(str(path), data, lines)


def apply_override(document: Document, text: str, top_level: Iterable[str]) -> None:
    """Set one `a.b=value` in the document; the value is read as YAML.

    Args:
        document: changed in place.
        text: the first part of the key is a stage's name or one of `top_level`.
        top_level: the recipe's own keys.

    Raises:
        ValueError: the text has no `=`, the value is not YAML, or the key leads nowhere.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    parts = key.split(".")
    if not equals or not all(parts):
        raise ValueError(f"--set {text}: expected key=value, as in --set pretrain.tokens=1000")
    location, rest = _start(document.data, parts, top_level)
    for part in rest:
        location = (*location, _step(_lookup(document.data, location), part, key))
    _put(document.data, location, _value(key, value))
    document.overrides[location] = key


def dump(data: object) -> str:
    """Return plain data as YAML that `read_document` reads back equal."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


def _note_lines(
    node: yaml.Node | None, at: Location, lines: dict[Location, int], above: Sequence[yaml.Node]
) -> None:
    if node is None:
        return
    if any(node is parent for parent in above):
        raise yaml.MarkedYAMLError(problem="an alias contains itself", problem_mark=node.start_mark)
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_lines(item, (*at, index), lines, (*above, node))
    if isinstance(node, yaml.MappingNode):
        _note_keys(node, at, lines, (*above, node))


def _note_keys(
    node: yaml.MappingNode, at: Location, lines: dict[Location, int], above: Sequence[yaml.Node]
) -> None:
    for key, value in node.value:
        place, line = (*at, key.value), key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode):
            if place in lines:
                problem = f"{dotted(place)}: duplicate key, first given in line {lines[place]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[place] = line
            _note_lines(value, place, lines, above)


def _start(data: Any, parts: list[str], top_level: Iterable[str]) -> tuple[Location, list[str]]:
    stages = data.get("stages") if isinstance(data, dict) else None
    names = (
        [s.get("name") for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []
    )
    if parts[0] in names:
        return ("stages", names.index(parts[0])), parts[1:]
    known = {*top_level, *(str(name) for name in names)}
    if parts[0] not in known:
        hint = did_you_mean(parts[0], known)
        raise ValueError(f"--set {'.'.join(parts)}: no stage or key '{parts[0]}'; {hint}")
    return (), parts


def _step(value: Any, part: str, key: str) -> str | int:
    if isinstance(value, list):
        if part.isdecimal() and int(part) < len(value):
            return int(part)
        raise ValueError(f"--set {key}: '{part}' is no index of a list of {len(value)}")
    if value is None or isinstance(value, dict):
        return part
    raise ValueError(f"--set {key}: '{part}' is no key of {shorten(value)}, a plain value")


def _lookup(data: Any, location: Location) -> Any:
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _put(data: Any, location: Location, value: Any) -> None:
    for part in location[:-1]:
        if isinstance(data, dict) and data.get(part) is None:
            data[part] = {}
        data = data[part]
    data[location[-1]] = value


def _value(key: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ValueError(f"--set {key}: {shorten(text)} is not valid YAML") from None


def _without_tags(data: Any, location: Location) -> Location:
    # pydantic puts the tag of a union into its path; the file does not
    kept: Location = ()
    for part in location[:-1]:
        if _lookup(data, (*kept, part)) is not None:
            kept = (*kept, part)
    return kept + location[-1:]


def _syntax(path: Path, error: yaml.YAMLError) -> str:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return f"{path}: is not text, expected a recipe (YAML)"
    return f"{path}:{mark.line + 1}: {', '.join(filter(None, (error.context, error.problem)))}"
