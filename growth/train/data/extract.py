"""What one Python source gives to a corpus: the English in its strings, or its bare code."""

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from itertools import accumulate

_PROSE_LENGTH = 2_000
_CODE_LENGTH = 4_000
# a few imports are no document: they stay with what follows them
_CODE_SHORTEST = 1_000

_ROLE = re.compile(r":[a-z:]+:`~?([^`<]*)(?:<[^`]*>)?`")
_WORD = re.compile(r"[a-z]+")
_COMMON = set(
    _WORD.findall(
        "a an and are as at be by can do for from has have if in is it its not of on or so that "
        "the then there these they this to was when which will with you"
    )
)
# paragraphs with these are examples, lists of arguments, headings, links or licences
_MARKS = (
    *(">>>", "::", "---", "===", "http:", "https:"),
    *("Args:", "Parameters:", "Returns:", "Raises:", "Copyright", "Licen"),
)
_Cut = tuple[tuple[int, int], tuple[int, int], str]


def paragraphs(source: str) -> list[str]:
    """Return the English paragraphs of a source's docstrings and multi-line strings.

    Raises:
        SyntaxError, ValueError, RecursionError: the source is not Python.
    """
    return [
        paragraph
        for text in _texts(ast.parse(source))
        for block in re.split(r"\n\s*\n", text)
        if _is_prose(paragraph := _ROLE.sub(r"\1", " ".join(block.split())).replace("``", "`"))
    ]


def definitions(source: str) -> list[str]:
    """Return a source without comments and docstrings, cut between top-level statements.

    Every part compiles. It has about 4000 characters, more where one statement has more.

    Raises:
        SyntaxError, ValueError, RecursionError, TokenError: the source is not Python.
    """
    bare = _bare(source)
    lines = bare.split("\n")
    # characters before each line
    before = [0, *accumulate(len(line) + 1 for line in lines)]
    parts, start, end = [], 0, 0
    for following in _statement_ends(bare):
        too_long = before[following] - before[start] > _CODE_LENGTH
        if too_long and before[end] - before[start] > _CODE_SHORTEST:
            parts.append((start, end))
            start = end
        end = following
    return ["\n".join(lines[i:j]).strip("\n") for i, j in [*parts, (start, end)] if j > i]


def joined(parts: Iterable[str]) -> Iterator[str]:
    """Yield documents of up to 2000 characters: parts in order, an empty line between them."""
    held: list[str] = []
    for part in parts:
        if held and sum(map(len, held)) + 2 * len(held) + len(part) > _PROSE_LENGTH:
            yield "\n\n".join(held)
            held = []
        held.append(part)
    if held:
        yield "\n\n".join(held)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without digits and signs."""
    return _WORD.findall(text.lower())


def _texts(tree: ast.AST) -> list[str]:
    found = {}
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Expr) else node
        if not isinstance(value, ast.Constant) or not isinstance(value.value, str):
            continue
        # a string that is a statement is documentation; of the others, those of many lines are
        if value is not node or "\n" in value.value:
            found[value.lineno, value.col_offset] = value.value
    return [text for _, text in sorted(found.items())]


def _is_prose(text: str) -> bool:
    if not 50 < len(text) <= _PROSE_LENGTH or not text[0].isupper() or text[-1] not in ".!?":
        return False
    if any(mark in text for mark in _MARKS):
        return False
    letters = sum(character.isalpha() or character == " " for character in text)
    found = words(text)
    common = sum(word in _COMMON for word in found)
    return letters > 0.85 * len(text) and common > 0.2 * len(found)


def _statement_ends(source: str) -> list[int]:
    """Return the last line of every top-level statement; statements that share a line are one."""
    ends: list[int] = []
    for node in ast.parse(source).body:
        decorators = [item.lineno for item in getattr(node, "decorator_list", [])]
        end = node.end_lineno or node.lineno
        if ends and min([node.lineno, *decorators]) <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            ends.append(end)
    return ends


def _bare(source: str) -> str:
    # not splitlines: python's lines end at "\n" alone, a form feed is inside of one
    lines = source.split("\n")
    cuts = sorted([*_comments(source), *_documentation(source, lines)], reverse=True)
    # from the last to the first, so that the places of those before stay right
    for (first, start), (last, end), instead in cuts:
        line = (lines[first][:start] + instead + lines[last][end:]).rstrip()
        if not line:
            last = _skip_empty(lines, last)
        lines[first : last + 1] = [line] if line else []
    return "\n".join(lines)


def _skip_empty(lines: list[str], row: int) -> int:
    while row + 1 < len(lines) and not lines[row + 1].strip():
        row += 1
    return row


def _comments(source: str) -> Iterator[_Cut]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            (row, start), (_, end) = token.start, token.end
            yield (row - 1, start), (row - 1, end), ""


def _documentation(source: str, lines: list[str]) -> Iterator[_Cut]:
    for node in ast.walk(ast.parse(source)):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                yield from _string_statements(statements, lines)


def _string_statements(statements: list[ast.stmt], lines: list[str]) -> Iterator[_Cut]:
    strings = [statement for statement in statements if _is_string(statement)]
    for statement in strings:
        start = _place(lines, statement.lineno, statement.col_offset)
        end = _place(lines, statement.end_lineno or 0, statement.end_col_offset or 0)
        rest = lines[end[0]][end[1] :].lstrip()
        alone = not lines[start[0]][: start[1]].strip() and (not rest or rest.startswith("#"))
        needed = len(strings) == len(statements) and statement is strings[0]
        yield start, end, "" if alone and not needed else "pass"


def _is_string(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _place(lines: list[str], line: int, offset: int) -> tuple[int, int]:
    # ast counts columns in utf-8 bytes
    return line - 1, len(lines[line - 1].encode()[:offset].decode())
