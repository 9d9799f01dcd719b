"""What a loss of the spherical family may depend on."""

from typing import NamedTuple

from torch import Tensor


class SphericalStatistics(NamedTuple):
    """Three numbers of each token's logits o (V,), in float64; 0 where ignored."""

    mean: Tensor  # (T,)
    variance: Tensor  # (T,), about the mean, over V; never negative, exactly 0 where below rounding
    margin: Tensor  # (T,), the target's logit less the mean
    vocabulary: int

    @property
    def logit(self) -> Tensor:
        """The target's logit, (T,)."""
        return self.margin + self.mean

    @property
    def mean_square(self) -> Tensor:
        """The mean of o^2, (T,)."""
        return self.variance + self.mean.square()

    def scaled(self, factor: float) -> "SphericalStatistics":
        """Return the statistics of factor * o."""
        moved = (factor * self.mean, factor**2 * self.variance, factor * self.margin)
        return SphericalStatistics(*moved, self.vocabulary)
