"""From products of queries and keys to attention scores: masks, caps, biases. Plain PyTorch."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._layout import Document
from ._philox import kept
from ._rules import Rules

# below this, log(softplus(x)) is x to the last place of float64
_LINEAR = -40.0


class Block(NamedTuple):
    """Some queries of a document and the keys between the first and the last that they see."""

    document: int
    shift: int  # query i of the document stands at key i + shift
    first_row: int  # in the packed queries
    first_query: int  # in the document
    rows: int
    first_key: int  # in the document
    keys: int

    def queries(self, device: torch.device) -> Tensor:
        """Return the places of the queries among the keys, (I, 1)."""
        start = self.first_query + self.shift
        return torch.arange(start, start + self.rows, device=device)[:, None]

    def key_places(self, device: torch.device) -> Tensor:
        """Return the places of the keys in their document, (J,)."""
        return torch.arange(self.first_key, self.first_key + self.keys, device=device)


def block_of(document: Document, rules: Rules, start: int, end: int) -> Block:
    """Return the block of rows `start` to `end` of a document's queries."""
    queries, keys = document.queries, document.keys
    count = keys.stop - keys.start
    # queries are trimmed at the front: both sides end at the bottom right
    shift = count - (queries.stop - queries.start)
    first = max(0, start + shift - rules.left)
    last = min(count, rules.limit, end + shift + rules.right)
    return Block(
        document.index,
        shift,
        queries.start + start,
        start,
        end - start,
        first,
        max(0, last - first),
    )


def gain_of(block: Block, rules: Rules) -> Tensor | None:
    """Return the gain of the block's rows (I, H), or None without one."""
    rows = slice(block.first_row, block.first_row + block.rows)
    return None if rules.gain is None else rules.gain[rows]


def scores(products: Tensor, gain: Tensor | None, block: Block, rules: Rules) -> Tensor:
    """Return the scores (H, I, J), -inf where a query does not see a key.

    Shapes: products (H, I, J), scaled; gain (I, H).
    """
    query, key = block.queries(products.device), block.key_places(products.device)
    values = _transform(products, gain, rules)
    if rules.alibi_slopes is not None:
        slopes = rules.alibi_slopes
        slopes = slopes if slopes.ndim == 1 else slopes[block.document]
        values = values - slopes[:, None, None].to(values.dtype) * (query - key).abs()
    unseen = (key < query - rules.left) | (key > query + rules.right) | (key >= rules.limit)
    return values.masked_fill(unseen, -math.inf)


def _transform(x: Tensor, gain: Tensor | None, rules: Rules) -> Tensor:
    if rules.transform == "none":
        return x
    if rules.transform == "softcap":
        return rules.a * torch.tanh(x / rules.a)
    wide, softplus = _softplus(x)
    if rules.transform == "softplus":
        tail = wide < _LINEAR
        return torch.where(tail, wide, softplus.masked_fill(tail, 1.0).log()).to(x.dtype)
    base, none = _base(softplus, gain, rules)
    return (rules.a * base.log()).masked_fill(none, -math.inf).to(x.dtype)


def _softplus(x: Tensor) -> tuple[Tensor, Tensor]:
    # half precision has neither the range nor the digits
    wide = x if x.dtype == torch.float64 else x.float()
    return wide, torch.logaddexp(wide, wide.new_zeros(()))


def _base(softplus: Tensor, gain: Tensor | None, rules: Rules) -> tuple[Tensor, Tensor]:
    # what is raised to a power, 1 where that is of nothing; and where
    assert rules.transform == "power"
    assert gain is not None
    base = gain.T[:, :, None].to(softplus.dtype) * softplus - rules.b
    return base.masked_fill(base <= 0, 1.0), base <= 0


def derivatives(
    products: Tensor, gain: Tensor | None, rules: Rules
) -> tuple[Tensor | None, Tensor | None]:
    """Return the derivatives of scores by products and by the gain, (H, I, J); None for 1 and 0.

    Written out: autograd does not run inside an operation, below a dispatch mode.
    """
    if rules.transform == "none":
        return None, None
    if rules.transform == "softcap":
        return 1.0 - torch.tanh(products / rules.a).square(), None
    _, softplus = _softplus(products)
    if rules.transform == "softplus":
        tail = products < _LINEAR
        return (products.sigmoid() / softplus).masked_fill(tail, 1.0), None
    assert gain is not None
    base, none = _base(softplus, gain, rules)
    by_base = (rules.a / base).masked_fill(none, 0.0)
    return by_base * gain.T[:, :, None] * products.sigmoid(), by_base * softplus


def dropped(weights: Tensor, block: Block, rules: Rules) -> Tensor:
    """Return weights (H, I, J) after dropout, or as they are without."""
    if rules.seed is None:
        return weights
    rows = torch.arange(block.first_row, block.first_row + block.rows, device=weights.device)
    keys = block.key_places(weights.device)
    seen = kept(rules.seed, rules.dropout, rows=rows, keys=keys, heads=weights.shape[0])
    return weights * seen / (1.0 - rules.dropout)


def unseeing_rows(lse: Tensor, end: int, rules: Rules) -> Tensor:
    """Return lse (T, H) with the sinks' own in rows of documents (before `end`) that see no key."""
    if rules.sinks is None:
        return lse
    rows = torch.arange(len(lse), device=lse.device)[:, None] < end
    return torch.where(rows & (lse == -math.inf), rules.sinks.to(lse.dtype), lse)
