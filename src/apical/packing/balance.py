"""Which rank computes which document, so that all ranks finish at about the same time."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush


@dataclass(frozen=True)
class Cost:
    """What a document of L tokens costs: ``linear * L + quadratic * L**2``, in any unit.

    The default is its tokens, which is right where attention is a small part of the time.
    """

    linear: float = 1.0
    quadratic: float = 0.0

    def __post_init__(self) -> None:
        if min(self.linear, self.quadratic) < 0:
            raise ValueError(f"{self} has a negative part, expected 0 or more: time only adds up")

    def __call__(self, length: int) -> float:
        return self.linear * length + self.quadratic * length * length

    @classmethod
    def of_transformer(
        cls,
        *,
        width: int,
        layers: int,
        feed_forward: int,
        kv_width: int | None = None,
        gated: bool = True,
        vocabulary: int = 0,
        causal: bool = True,
    ) -> "Cost":
        """Return the floating-point operations of training on a document.

        A weight takes 6 per token; a pair of tokens takes 12 per attention channel and layer (the
        scores and the weighted sum, 2 each, in three passes). Of the L * L pairs a causal document
        has L * (L + 1) / 2. Norms, activations and the softmax are not counted; if attention runs
        at another speed than the rest, measure both parts instead.

        Args:
            width: model width, also that of all query heads together.
            layers: number of layers.
            feed_forward: width inside the feed-forward block.
            kv_width: width of all key heads together; default: `width`.
            gated: the feed-forward block has three matrices, not two.
            vocabulary: rows of the output head, 0 for a model without one.
            causal: a token attends to what is before it, not to the whole document.

        Source: arXiv 2001.08361, section 2.1, with the attention written out.
        """
        attention = 2 * width * (width + (kv_width or width))
        weights = layers * (attention + (2 + gated) * width * feed_forward) + vocabulary * width
        pairs = 12 * layers * width
        if causal:
            return cls(linear=6 * weights + pairs / 2, quadratic=pairs / 2)
        return cls(linear=6 * weights, quadratic=pairs)


_TOKENS = Cost()


def plan(
    lengths: Sequence[int],
    ranks: int,
    *,
    method: str = "cost",
    cost: Cost = _TOKENS,
    equal_counts: bool = True,
) -> list[list[int]]:
    """Return for each rank the documents it computes: indices into `lengths`, each index once.

    Needs no communication: every rank that knows all lengths finds the same plan.

    Args:
        lengths: tokens of every document of every rank.
        ranks: how many ranks there are.
        method: how documents are dealt out.

            - ``cost``: the most expensive first, each to the rank with the least work so far; ranks
              keep the order of `lengths`.
            - ``columns``: sorted by descending length and dealt out in turn, so rank r gets places
              r, r + ranks, and so on. Counts are equal; the earlier ranks always get more.
        cost: what ``cost`` balances; ``columns`` asks only for the order of the lengths.
        equal_counts: with ``cost``, every rank gets the same number of documents, or one more
            where the number does not divide. False balances better.

    Raises:
        ValueError: `ranks` is below 1, a length is negative, or `method` is unknown.

    Source: ``columns`` is the padding exchange of arXiv 2208.08124; ``cost`` is the longest
    processing time rule of Graham 1969, with a limit on the counts.
    """
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}, expected at least 1")
    if min(lengths, default=0) < 0:
        raise ValueError(f"lengths hold {min(lengths)}, expected 0 or more tokens")
    if method == "columns":
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        return [order[rank::ranks] for rank in range(ranks)]
    if method == "cost":
        costs = [cost(length) for length in lengths]
        return _least_work_first(costs, ranks, equal_counts=equal_counts)
    raise ValueError(f"method is {method!r}, expected 'cost' or 'columns'")


def imbalance(
    lengths: Sequence[int], assignment: Sequence[Sequence[int]], cost: Cost = _TOKENS
) -> float:
    """Return the most expensive rank's cost over the mean: 1 is perfect, as is a plan of nothing.

    The others wait for that rank, so a step takes this many times what it could.

    Args:
        lengths: tokens of every document.
        assignment: for each rank the indices of its documents, as `plan` returns them.
        cost: what a document costs.

    Raises:
        ValueError: `assignment` has no rank.
    """
    if not assignment:
        raise ValueError("assignment is empty, expected a list of documents for each rank")
    work = [sum(cost(lengths[n]) for n in documents) for documents in assignment]
    return max(work) * len(work) / sum(work) if sum(work) else 1.0


def _least_work_first(costs: Sequence[float], ranks: int, *, equal_counts: bool) -> list[list[int]]:
    assigned: list[list[int]] = [[] for _ in range(ranks)]
    # so many ranks may take one document more than `quota`
    quota, more = divmod(len(costs), ranks) if equal_counts else (len(costs), 0)
    work = [(0.0, rank) for rank in range(ranks)]
    heapify(work)
    for document in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        done, rank = heappop(work)
        while len(assigned[rank]) == quota and more == 0:
            done, rank = heappop(work)
        assigned[rank].append(document)
        if len(assigned[rank]) > quota:
            more -= 1
        else:
            heappush(work, (done + costs[document], rank))
    return [sorted(documents) for documents in assigned]
