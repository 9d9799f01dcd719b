"""Documents into packs of at most so many tokens: bin packing, all at once or from a stream."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from operator import index
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


def pack(
    lengths: Iterable[int] | Tensor, capacity: int, *, method: str = "best_fit_decreasing"
) -> list[list[int]]:
    """Return packs of at most `capacity` tokens: lists of indices into `lengths`, each index once.

    Takes O(n log n) comparisons, and gives the same packs for the same lengths everywhere.

    Packs come in the order in which they were opened and list documents in the order in which they
    were put in. The decreasing methods open the packs of the longest documents first: shuffle the
    packs before training on them.

    Args:
        lengths: tokens of each document, 0 or more.
        capacity: most tokens of a pack.
        method: which pack a document goes into. Fill is best for the first, order for the last.

            - ``best_fit_decreasing``: longest documents first, each into the fullest pack that has
              room (of equally full ones, the one used last). Asymptotically at most 11/9 of the
              fewest packs possible.
            - ``first_fit_decreasing``: longest first, each into the first pack that has room. At
              most 11/9 of the fewest, plus 6/9.
            - ``best_fit``, ``first_fit``: the same in the given order. At most 1.7 times as many
              as the fewest.
            - ``next_fit``: in order, a new pack when the document does not fit into the last one;
              concatenated packs are the given order. At most twice the fewest.

    Raises:
        ValueError: a document is longer than `capacity`, a length is negative or no integer,
            `capacity` is below 1, or `method` is unknown.

    Source: bounds of Johnson et al. 1974, Dosa 2007, Dosa and Sgall 2013 and 2014.
    """
    if method not in _METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(_METHODS)}")
    capacity = _checked_capacity(capacity)
    values = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    sizes = [_checked_length(n, size, capacity) for n, size in enumerate(values)]
    order: Iterable[int] = range(len(sizes))
    if method.endswith("_decreasing"):
        order = sorted(order, key=sizes.__getitem__, reverse=True)
    return _METHODS[method](sizes, order, capacity)


class PackStream(Generic[T]):
    """Packs from a stream of documents, of which at most `buffer` are held back.

    Whenever `buffer` documents wait they are packed by best_fit_decreasing. The fuller half of the
    packs leaves, and so does the pack of the document that waits longest, which bounds every wait;
    the others wait for more. A larger buffer fills packs better and moves documents further: one
    leaves after at most `buffer` rounds, in practice after a few, and short documents, which fit
    anywhere, sooner than long ones. Within a pack, and among packs that leave together, documents
    keep the order in which they came.

    Every document leaves once. The same stream gives the same packs.

    Args:
        capacity: most tokens of a pack.
        length: gives the number of tokens of a document.
        buffer: how many documents may wait.

    Raises:
        ValueError: `capacity` or `buffer` is below 1.
    """

    def __init__(
        self, capacity: int, *, length: Callable[[T], int] = len, buffer: int = 1024
    ) -> None:
        if index(buffer) < 1:
            raise ValueError(f"buffer is {buffer}, expected at least 1 document")
        self._capacity = _checked_capacity(capacity)
        self._length = length
        self._buffer = buffer
        self._count = 0
        self._waiting: list[tuple[int, T]] = []

    def add(self, document: T) -> list[list[T]]:
        """Take a document in and return the packs that are complete by it, often none.

        Raises:
            ValueError: the document is longer than the capacity; the stream is as it was before.
        """
        size = _checked_length(self._count, self._length(document), self._capacity)
        self._count += 1
        self._waiting.append((size, document))
        return self._leave(half=True) if len(self._waiting) >= self._buffer else []

    def flush(self) -> list[list[T]]:
        """Return what still waits, in packs; the last ones may be far from full."""
        return self._leave(half=False)

    def _leave(self, *, half: bool) -> list[list[T]]:
        sizes = [size for size, _ in self._waiting]
        packs = [sorted(places) for places in pack(sizes, self._capacity)]
        # the document that waits longest is the first
        packs.sort(key=lambda places: (places[0] > 0, -sum(sizes[n] for n in places), places))
        leaving = sorted(packs[: (len(packs) + 1) // 2] if half else packs)
        documents = [[self._waiting[n][1] for n in places] for places in leaving]
        gone = {n for places in leaving for n in places}
        self._waiting = [pair for n, pair in enumerate(self._waiting) if n not in gone]
        return documents


def pack_stream(
    documents: Iterable[T],
    capacity: int,
    *,
    length: Callable[[T], int] = len,
    buffer: int = 1024,
) -> Iterator[list[T]]:
    """Yield packs of at most `capacity` tokens from any number of documents; see `PackStream`.

    Raises:
        ValueError: a document is longer than `capacity`; `capacity` or `buffer` is below 1.
    """
    stream = PackStream(capacity, length=length, buffer=buffer)
    for document in documents:
        yield from stream.add(document)
    yield from stream.flush()


def _best_fit(sizes: list[int], order: Iterable[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    # the amounts of free space there are, sorted, and the packs that have each
    amounts: list[int] = []
    having: dict[int, list[int]] = {}
    for document in order:
        place = bisect_left(amounts, sizes[document])
        if place == len(amounts):
            number, free = len(packs), capacity
            packs.append([])
        else:
            free = amounts[place]
            number = having[free].pop()
            if not having[free]:
                del amounts[place], having[free]
        packs[number].append(document)
        free -= sizes[document]
        if free not in having:
            having[free] = []
            insort(amounts, free)
        having[free].append(number)
    return packs


def _first_fit(sizes: list[int], order: Iterable[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    # node i is the most free space under it, its children 2i and 2i + 1, packs the last `leaves`
    leaves, most = 1, [-1, -1]
    for document in order:
        node = 1
        if most[1] >= sizes[document]:
            while node < leaves:
                node = 2 * node + (most[2 * node] < sizes[document])
            free = most[node]
        else:
            if len(packs) == leaves:
                leaves, most = 2 * leaves, _doubled(most)
            node, free = leaves + len(packs), capacity
            packs.append([])
        packs[node - leaves].append(document)
        _update(most, node, free - sizes[document])
    return packs


def _doubled(most: list[int]) -> list[int]:
    """Return a tree of twice the leaves, the new ones without space; the old tree is its left."""
    half = len(most) // 2
    tree = [-1] * (4 * half)
    tree[2 * half : 3 * half] = most[half:]
    for node in range(2 * half - 1, 0, -1):
        tree[node] = max(tree[2 * node], tree[2 * node + 1])
    return tree


def _update(most: list[int], node: int, free: int) -> None:
    most[node] = free
    while node > 1:
        free = max(free, most[node ^ 1])
        node //= 2
        if most[node] == free:
            return
        most[node] = free


def _next_fit(sizes: list[int], order: Iterable[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    free = -1
    for document in order:
        if sizes[document] > free:
            packs.append([])
            free = capacity
        packs[-1].append(document)
        free -= sizes[document]
    return packs


_METHODS: dict[str, Callable[[list[int], Iterable[int], int], list[list[int]]]] = {
    "best_fit_decreasing": _best_fit,
    "first_fit_decreasing": _first_fit,
    "best_fit": _best_fit,
    "first_fit": _first_fit,
    "next_fit": _next_fit,
}


def _checked_capacity(capacity: Any) -> int:
    if not _is_integer(capacity) or capacity < 1:
        raise ValueError(f"capacity is {capacity!r}, expected an integer of at least 1 token")
    return index(capacity)


def _checked_length(number: int, length: Any, capacity: int) -> int:
    if not _is_integer(length) or length < 0:
        raise ValueError(f"document {number} has length {length!r}, expected an integer, 0 or more")
    if length > capacity:
        raise ValueError(
            f"document {number} has {length} tokens, a pack holds {capacity}:"
            " split or truncate the document, or raise capacity"
        )
    return index(length)


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
