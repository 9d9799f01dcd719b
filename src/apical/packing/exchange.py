"""Documents from rank to rank, so that each gets what the plan gives it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .balance import Cost, plan


def exchange(
    documents: Sequence[Tensor | Sequence[int]],
    *,
    method: str = "cost",
    cost: Cost | None = None,
    equal_counts: bool = True,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Give this rank's documents away and return those that `plan` assigns to it.

    A collective call: every rank of the group calls it, also one without documents, with the same
    options. Two gathers of the lengths and one all-to-all of the tokens. A second column, such as
    labels, goes the same way by a second call, since only the lengths decide.

    Shapes: documents (L,) each; results (L,) each, int64, on `device`.

    Args:
        documents: tokens of this rank's documents.
        method: see `plan`.
        cost: see `plan`; default: the tokens.
        equal_counts: see `plan`.
        group: the ranks that exchange; default: all.
        device: where the tokens travel: ``"cuda"`` for NCCL.

    Raises:
        ValueError: a document is not one-dimensional, or `plan` refuses.
    """
    mine = [_checked(number, document, device) for number, document in enumerate(documents)]
    counts, lengths = _gather_lengths([len(tokens) for tokens in mine], group, device)
    owner = [rank for rank, count in enumerate(counts) for _ in range(count)]
    assigned = plan(
        lengths, len(counts), method=method, cost=cost or Cost(), equal_counts=equal_counts
    )
    here = dist.get_rank(group)
    offset = sum(counts[:here])
    leaving = [[n for n in numbers if owner[n] == here] for numbers in assigned]
    arriving = [[n for n in assigned[here] if owner[n] == rank] for rank in range(len(counts))]
    sent = [mine[n - offset] for numbers in leaving for n in numbers]
    sizes = [sum(lengths[n] for n in numbers) for numbers in arriving]
    received = torch.empty(sum(sizes), dtype=torch.int64, device=device)
    dist.all_to_all_single(
        received,
        torch.cat(sent) if sent else received.new_empty(0),
        sizes,
        [sum(lengths[n] for n in numbers) for numbers in leaving],
        group=group,
    )
    order = [n for numbers in arriving for n in numbers]
    pieces = dict(zip(order, received.split([lengths[n] for n in order]), strict=True))
    return [pieces[n] for n in assigned[here]]


def _checked(number: int, document: Tensor | Sequence[int], device: torch.device | str) -> Tensor:
    tokens = torch.as_tensor(document, dtype=torch.int64, device=device)
    if tokens.ndim != 1:
        raise ValueError(
            f"document {number} has shape {tuple(tokens.shape)}, expected (tokens,): flatten it"
        )
    return tokens


def _gather_lengths(
    lengths: list[int], group: dist.ProcessGroup | None, device: torch.device | str
) -> tuple[list[int], list[int]]:
    """Return how many documents each rank has, and the lengths of all, rank after rank."""
    ranks = dist.get_world_size(group)
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(counts, torch.tensor([len(lengths)], device=device), group=group)
    numbers = [int(count) for count in counts]
    # a collective takes equal shapes: filled up to the most
    padded = torch.zeros(max(numbers), dtype=torch.int64, device=device)
    padded[: len(lengths)] = torch.tensor(lengths, dtype=torch.int64, device=device)
    rows = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(rows, padded, group=group)
    return numbers, [n for row, k in zip(rows, numbers, strict=True) for n in row[:k].tolist()]
