"""What one call asks of every implementation: masks, scores, dropout. Flat, as the op's schema."""

from typing import NamedTuple

from torch import Tensor

# no bound: longer than any document
UNBOUNDED = 2**31 - 1


class Rules(NamedTuple):
    """The options of one call, in the order of the op's schema.

    Query i of I sees the keys j of J from i + J - I - left to i + J - I + right, and of those the
    first `limit` of the document. README.md has all formulas.
    """

    alibi_slopes: Tensor | None  # (H,) or (N, H) float32
    sinks: Tensor | None  # (H,) float32
    gain: Tensor | None  # (T, H) float32, of transform "power"
    seed: Tensor | None  # (1,) int64, of dropout
    scale: float
    left: int
    right: int
    limit: int
    transform: str  # "none", "softcap", "softplus" or "power"
    a: float  # softcap: the cap; power: the exponent
    b: float  # power: the offset
    dropout: float

    @property
    def causal(self) -> bool:
        """Whether the only mask is the causal one."""
        return (self.left, self.right, self.limit) == (UNBOUNDED, 0, UNBOUNDED)

    @property
    def full(self) -> bool:
        """Whether every query sees every key of its document."""
        return (self.left, self.right, self.limit) == (UNBOUNDED, UNBOUNDED, UNBOUNDED)

    @property
    def plain(self) -> bool:
        """Whether scores and probabilities are those of softmax attention; masks aside."""
        extras = (self.alibi_slopes, self.sinks, self.gain, self.seed)
        return self.transform == "none" and all(extra is None for extra in extras)
