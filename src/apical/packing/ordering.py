"""Related documents one after the other: the order of in-context pre-training."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ContextOrder:
    """Documents in the order of training, and which of them belong together.

    order: indices of documents; each document is here or in `dropped`, once.
    groups: the number of each one's group, parallel to `order`; groups are contiguous, and begin
        with 0. `PackedCollator` takes it as ``group``.
    dropped: documents that repeat the one before them, in the order in which they were met.
    """

    order: list[int]
    groups: list[int]
    dropped: list[int]


def context_order(
    neighbours: Tensor | Sequence[Sequence[int]],
    *,
    texts: Sequence[str] | None = None,
    path_length: int = 21,
    shortest_path: int | None = None,
    similarity: float = 0.85,
) -> ContextOrder:
    """Return an order in which documents follow others that are like them, each one once.

    A path starts at the unseen document of the lowest degree and goes on to the first unseen one
    among the neighbours, until there is none or the path is full. Documents of paths that stay
    short are put before their nearest neighbour in a path that is kept, one by one in the order of
    the walk; those without such a neighbour stay with the rest of their path. Ties go to the lower
    index: the same neighbours give the same order.

    Shapes: neighbours (N, k), the nearest first; -1 and the document itself are passed over.

    Args:
        neighbours: from `nearest_neighbours` or another search; rows may differ in length.
        texts: if given, documents are dropped that repeat the one before them: of the first 100
            characters, more than `similarity` of all 3-character pieces are in both.
        path_length: most documents of a path; those put in later come on top.
        shortest_path: paths below this are taken apart; default: `path_length`, as released.
        similarity: see `texts`; between 0 and 1.

    Raises:
        ValueError: a neighbour is no document, `texts` are not one per document, or a length is
            out of range.

    Source: arXiv 2310.10638, the lowest degree first as in its algorithm 1, the rest as in its
    released code, which starts anywhere. The degree is the number of documents that are joined to
    one as its neighbour or by having it for a neighbour, seen or not.
    """
    shortest = path_length if shortest_path is None else shortest_path
    if not 1 <= shortest <= path_length:
        raise ValueError(
            f"shortest_path is {shortest} and path_length {path_length}, expected 1 or more, and"
            " shortest_path at most path_length"
        )
    if not 0 <= similarity <= 1:
        raise ValueError(f"similarity is {similarity}, expected 0 to 1")
    near = _checked(neighbours)
    if texts is not None and len(texts) != len(near):
        raise ValueError(f"texts has {len(texts)} entries, expected one for each of {len(near)}")
    paths = _dissolved(_walk(near, path_length), near, shortest)
    kept, dropped = (paths, []) if texts is None else _distinct(paths, texts, similarity)
    groups = [number for number, path in enumerate(kept) for _ in path]
    return ContextOrder([n for path in kept for n in path], groups, dropped)


def _checked(neighbours: Tensor | Sequence[Sequence[int]]) -> list[list[int]]:
    rows = neighbours.tolist() if isinstance(neighbours, Tensor) else neighbours
    for document, row in enumerate(rows):
        wrong = [n for n in row if not -1 <= n < len(rows)]
        if wrong:
            raise ValueError(
                f"document {document} has neighbour {wrong[0]}, expected -1 to {len(rows) - 1}"
            )
    return [[n for n in row if n not in (-1, document)] for document, row in enumerate(rows)]


def _walk(near: list[list[int]], path_length: int) -> list[list[int]]:
    joined = [set(row) for row in near]
    for document, row in enumerate(near):
        for neighbour in row:
            joined[neighbour].add(document)
    seen = [False] * len(near)
    paths: list[list[int]] = []
    for start in sorted(range(len(near)), key=lambda document: len(joined[document])):
        path: list[int] = []
        document = None if seen[start] else start
        while document is not None and len(path) < path_length:
            seen[document] = True
            path.append(document)
            document = next((n for n in near[document] if not seen[n]), None)
        if path:
            paths.append(path)
    return paths


def _dissolved(paths: list[list[int]], near: list[list[int]], shortest: int) -> list[list[int]]:
    """Return the paths with the documents of short ones put into the others."""
    settled = {document for path in paths if len(path) >= shortest for document in path}
    before: defaultdict[int, list[int]] = defaultdict(list)
    left: list[list[int]] = []
    for path in paths:
        stays = path
        if len(path) < shortest:
            stays = []
            for document in path:
                target = next((n for n in near[document] if n in settled), None)
                if target is None:
                    stays.append(document)
                else:
                    before[target].append(document)
                    settled.add(document)
        left.append(stays)
    return [_with_insertions(path, before) for path in left if path]


def _with_insertions(path: list[int], before: dict[int, list[int]]) -> list[int]:
    """Return a path with, before each document, what was put before it, one after the other."""
    result: list[int] = []
    stack = path[::-1]
    while stack:
        document = stack.pop()
        earlier = before.pop(document, [])
        if earlier:
            stack += [document, *reversed(earlier)]
        else:
            result.append(document)
    return result


def _distinct(
    paths: list[list[int]], texts: Sequence[str], similarity: float
) -> tuple[list[list[int]], list[int]]:
    """Return the paths without repeated documents, and these; of several alike the first stays."""
    kept: list[list[int]] = []
    dropped: list[int] = []
    last: set[str] = set()
    for path in paths:
        stays = []
        for document in path:
            pieces = _pieces(texts[document])
            if len(pieces & last) > similarity * len(pieces | last):
                dropped.append(document)
            else:
                stays.append(document)
                last = pieces
        if stays:
            kept.append(stays)
    return kept, dropped


def _pieces(text: str) -> set[str]:
    """Return the 3-character pieces of a text's beginning; a shorter text is one piece."""
    head = text[:100]
    return {head[n : n + 3] for n in range(max(1, len(head) - 2))}
