"""How each kind of support is drawn from its seed."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._permutation import permuted

if TYPE_CHECKING:
    from .support import Support


def check(support: Support) -> None:
    """Raise ValueError unless this support can be drawn."""
    from .support import KINDS

    rows, columns, kind = support.out_features, support.in_features, support.kind
    if rows < 1 or columns < 1:
        raise ValueError(f"a support needs at least 1 x 1 entries, got {rows} x {columns}")
    if (kind == "explicit") != (support.positions is not None):
        raise ValueError("positions make an explicit support: use Support.explicit(positions, ...)")
    if kind == "explicit":
        return
    if kind not in KINDS:
        raise ValueError(f"support must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 <= support.seed < 2**63:
        raise ValueError(f"seed must be in 0 .. 2**63 - 1, got {support.seed}")
    if kind == "nm":
        _check_of(support)
    elif not 0 < support.density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {support.density}")
    if kind == "grouped":
        _check_block(support)
    if count(support) < 1:
        raise ValueError(
            f"density {support.density} stores no entry of {rows} x {columns}; raise it"
        )


def _check_of(support: Support) -> None:
    few, many = support.block
    if not 0 < few <= many:
        raise ValueError(f"nm keeps n of m entries, 0 < n <= m; got block={support.block}")
    if support.in_features % many:
        raise ValueError(
            f"nm needs in_features divisible by {many}, got {support.in_features}; "
            "use support='uniform'"
        )
    if not math.isclose(support.density, few / many):
        raise ValueError(f"nm with block={support.block} has density {few / many}, not "
                         f"{support.density}; pass that")  # fmt: skip


def _check_block(support: Support) -> None:
    height, width = support.block
    if height < 1 or width < 1:
        raise ValueError(f"block must be (rows, columns) of at least 1, got {support.block}")
    if support.in_features < width:
        raise ValueError(
            f"grouped needs in_features of at least a block's {width} columns, got "
            f"{support.in_features}; pass a narrower block"
        )


def count(support: Support) -> int:
    """Return how many entries are stored."""
    rows, columns = support.out_features, support.in_features
    if support.positions is not None:
        return len(support.positions)
    if support.kind == "regular":
        return rows * _per_row(support)
    if support.kind == "nm":
        return rows * columns // support.block[1] * support.block[0]
    if support.kind == "grouped":
        height, width = support.block
        sizes = (min(height, rows - i * height) for i in range(len(_hand_sizes(support))))
        return sum(
            size * hand * width for size, hand in zip(sizes, _hand_sizes(support), strict=True)
        )
    return int(support.density * rows * columns)


def flat(support: Support, device: torch.device) -> Tensor:
    """Return the flat positions of the values, in their order."""
    if support.positions is not None:
        return support.positions.to(device)
    return _DRAW[support.kind](support, device)


def blocks(support: Support) -> list[list[int]]:
    """Return the columns of blocks of every row of blocks, ascending: hands of shuffled decks.

    Every column of blocks is dealt before one is dealt again, so columns are used alike.
    """
    size = support.in_features // support.block[1]
    deck: list[int] = []
    hands, decks = [], 0
    for wanted in _hand_sizes(support):
        hand: set[int] = set()
        held: list[int] = []
        while len(hand) < wanted:
            if not deck:
                deck = permuted(
                    torch.arange(size, device="cpu"), size, *_key(support), decks
                ).tolist()
                decks += 1
            card = deck.pop()
            held.append(card) if card in hand else hand.add(card)
        deck += held
        hands.append(sorted(hand))
    return hands


def checked_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Return explicit positions as sorted int64, or say what is wrong with them."""
    if positions.ndim != 1 or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"positions must be (S,) int32 or int64, got {tuple(positions.shape)} {positions.dtype}"
        )
    flat = positions.detach().cpu().long().sort().values
    if not len(flat):
        raise ValueError("positions are empty; a support stores at least one entry")
    if flat[0] < 0 or flat[-1] >= rows * columns:
        raise ValueError(f"positions must be in 0 .. {rows * columns - 1}, found "
                         f"{(flat[0] if flat[0] < 0 else flat[-1]).item()}")  # fmt: skip
    if (flat[1:] == flat[:-1]).any():
        raise ValueError("positions must be distinct; one occurs twice")
    return flat


def _uniform(support: Support, device: torch.device) -> Tensor:
    drawn = torch.arange(count(support), device=device)
    return permuted(drawn, support.out_features * support.in_features, *_key(support)).sort().values


def _regular(support: Support, device: torch.device) -> Tensor:
    # rows take cards from shuffled decks of the columns; of many cards, those they do without
    rows, size, hand = support.out_features, support.in_features, _per_row(support)
    many = 2 * hand > size
    taken = size - hand if many else hand
    deck = torch.arange(math.ceil(rows * taken / size), device=device)[:, None]
    place = torch.arange(size, device=device).expand(len(deck), size)
    cards = _without_repeats(permuted(place, size, *_key(support), deck), max(taken, 1))
    column = cards.flatten()[: rows * taken].view(rows, taken)
    first = torch.arange(rows, device=device)[:, None] * size
    if not many:
        return (first + column.sort(1).values).flatten()
    kept = torch.ones(rows * size, dtype=torch.bool, device=device)
    kept[first + column] = False
    return kept.nonzero().flatten()


def _without_repeats(cards: Tensor, hand: int) -> Tensor:
    # a hand that ends one deck begins the next: what it holds goes further down, above the last
    # cards, which are those that the hand after it may hold
    decks, size = cards.shape
    held = (torch.arange(decks, device=cards.device)[1:, None] * size) % hand
    order = (cards[:-1].argsort(1).gather(1, cards[1:]) >= size - held).int()
    order[:, size - hand :] = 2
    order = order.argsort(dim=1, stable=True)
    return torch.cat([cards[:1], cards[1:].gather(1, order)])


def _grouped(support: Support, device: torch.device) -> Tensor:
    height, width = support.block
    parts = []
    for i, hand in enumerate(blocks(support)):
        row = torch.arange(i * height, min((i + 1) * height, support.out_features), device=device)
        first = torch.tensor(hand, dtype=torch.int64, device=device)[:, None] * width
        column = first + torch.arange(width, device=device)
        # columns of a block follow one another, and in each the rows of the block
        parts.append((column.flatten()[:, None] + row * support.in_features).flatten())
    return torch.cat(parts)


def _of(support: Support, device: torch.device) -> Tensor:
    few, many = support.block
    group = torch.arange(support.out_features * support.in_features // many, device=device)[:, None]
    slot = torch.arange(few, device=device).expand(len(group), few)
    kept = permuted(slot, many, *_key(support), group.expand_as(slot)).sort(1).values
    return (group * many + kept).flatten()


_DRAW = {"uniform": _uniform, "regular": _regular, "grouped": _grouped, "nm": _of}


def _per_row(support: Support) -> int:
    return max(round(support.density * support.in_features), 1)


def _hand_sizes(support: Support) -> list[int]:
    # fractions of a block are spread, so that all together have the density asked for
    height, width = support.block
    limit, groups = support.in_features // width, math.ceil(support.out_features / height)
    wanted = support.density * support.in_features / width
    ends = [math.floor(i * wanted + 0.5) for i in range(groups + 1)]
    return [min(end - start, limit) for start, end in itertools.pairwise(ends)]


def _key(support: Support) -> tuple[int, int]:
    return support.seed & 0xFFFFFFFF, support.seed >> 32
