"""Numbers of blocks that a layer can be cut into."""

import math


def check_blocks(blocks: int, in_features: int, out_features: int) -> None:
    """Raise ValueError unless both sides of a matrix can be cut into so many equal blocks."""
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
        raise ValueError(f"blocks is {blocks!r}; expected an integer of at least 1")
    if in_features % blocks or out_features % blocks:
        common = math.gcd(in_features, out_features)
        fits = [number for number in range(1, common + 1) if common % number == 0]
        below = max((number for number in fits if number < blocks), default=None)
        above = min((number for number in fits if number > blocks), default=None)
        nearest = " and ".join(str(number) for number in (below, above) if number)
        raise ValueError(
            f"blocks is {blocks}, which does not divide both in_features={in_features} and "
            f"out_features={out_features}; the nearest that do: {nearest}"
        )
