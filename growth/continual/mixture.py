"""Which sample comes next: a pure function of (seed, number of draws), for any world size.

Random numbers are words of the counter-based Philox generator, so nothing has to be replayed
to go to a position, and every rank can compute the draws of all ranks. Only raw words are used:
numpy keeps them the same between versions, which it does not promise of its distributions.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# draws computed at once, for speed; the stream is defined by this number, so it is fixed
_BLOCK = 1024
_MAX_SEED = 2**64


class Mixture:
    """Draws samples from weighted sources, each source once through per epoch.

    Every epoch of a source is a permutation of its own, so no sample is repeated before all
    were seen. Sources have no common epoch: a small one (replay) begins its next epoch without
    ending the others'. A source of weight 0 changes nothing, not even a bit.

    Args:
        sizes: samples in each source.
        weights: probability of drawing a sample of each source, up to a common factor;
            a source without a weight is never drawn.
        seed: from 0 to 2**64 - 1.

    Raises:
        ValueError: a weight is negative, not finite or of an unknown or empty source, or
            all are zero.
    """

    def __init__(self, *, sizes: Mapping[str, int], weights: Mapping[str, float], seed: int):
        if not 0 <= seed < _MAX_SEED:
            raise ValueError(f"seed is {seed}, expected 0 to 2**64 - 1")
        shares = _shares(weights)
        _check_sources(sizes, shares)
        self.sizes = dict(sizes)
        self._seed = seed
        # sorted, so that the stream does not depend on the order in which sources are named
        self._names = sorted(name for name, share in shares.items() if share > 0)
        self._bounds = np.cumsum([shares[name] for name in self._names])
        self._draws = 0
        self._counts = dict.fromkeys(self.sizes, 0)
        self._block: tuple[int, list[int]] = (-1, [])
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def draw(self) -> tuple[str, int]:
        """Return the next (source, index of the sample in it) and move on."""
        name, index = self.peek()
        self._draws += 1
        self._counts[name] += 1
        return name, index

    def peek(self) -> tuple[str, int]:
        """Return what `draw` would return, without moving on."""
        block, place = divmod(self._draws, _BLOCK)
        if self._block[0] != block:
            self._block = (block, self._choices(block))
        name = self._names[self._block[1][place]]
        epoch, position = divmod(self._counts[name], self.sizes[name])
        return name, int(self._order(name, epoch)[position])

    def state(self) -> dict[str, Any]:
        """Return the position: the number of draws, in all and of each source."""
        return {"draws": self._draws, "counts": dict(self._counts)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state` returned, on any world size.

        Raises:
            ValueError: the sources are others, or the counts do not add up.
        """
        draws, counts = state["draws"], dict(state["counts"])
        if counts.keys() != self._counts.keys():
            raise ValueError(
                f"saved mixture has sources {sorted(counts)}, this one has {sorted(self._counts)}"
            )
        if min(counts.values()) < 0 or sum(counts.values()) != draws:
            raise ValueError(f"saved mixture is damaged: counts {counts} of {draws} draws")
        self._draws, self._counts = draws, counts

    def _choices(self, block: int) -> list[int]:
        words = _words(self._seed, stream=0, block=block, count=_BLOCK)
        # the 53 high bits as a float64 in [0, 1)
        uniforms = (words >> np.uint64(11)) * 2.0**-53
        chosen = np.searchsorted(self._bounds, uniforms, side="right")
        # the bounds may end a rounding below 1
        return np.minimum(chosen, len(self._names) - 1).tolist()

    def _order(self, name: str, epoch: int) -> np.ndarray:
        cached = self._orders.get(name)
        if cached is None or cached[0] != epoch:
            stream = _stream(name, epoch)
            words = _words(self._seed, stream=stream, block=0, count=self.sizes[name])
            cached = (epoch, np.argsort(words, kind="stable"))
            self._orders[name] = cached
        return cached[1]


def token_weights(
    weights: Mapping[str, float], mean_lengths: Mapping[str, float]
) -> dict[str, float]:
    """Return the probabilities of drawing a sample that give these shares of the tokens.

    Args:
        weights: wanted share of the tokens of each source, up to a common factor.
        mean_lengths: tokens of an average sample of each source.

    Raises:
        ValueError: weights are invalid, or a source of positive weight has no positive length.
    """
    rates = {name: share for name, share in _shares(weights).items() if share > 0}
    for name in rates:
        length = mean_lengths.get(name, 0)
        if not 0 < length < math.inf:
            raise ValueError(f"mean_lengths[{name!r}] is {length}, expected a positive number")
        rates[name] /= mean_lengths[name]
    total = math.fsum(rates.values())
    return {name: rates.get(name, 0.0) / total for name in weights}


def replay(new: Mapping[str, float], old: Mapping[str, float], *, rate: float) -> dict[str, float]:
    """Return the weights of new data in which a share `rate` is replayed old data.

    Replayed samples take the place of new ones, so a token budget stays what it was. Usual
    rates are 0.05 for a weak shift and 0.25 for a strong one.

    Raises:
        ValueError: rate is outside 0 to 1, or weights are invalid.

    Source: Ibrahim et al. 2024 (arXiv 2403.08763).
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}, expected 0 to 1")
    mixed = {name: share * (1 - rate) for name, share in _shares(new).items()}
    for name, share in _shares(old).items():
        mixed[name] = mixed.get(name, 0.0) + share * rate
    return mixed


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"weights[{name!r}] is {weight}, expected a finite number >= 0")
    total = math.fsum(weights.values())
    if total == 0:
        raise ValueError(
            f"zero-token mixture: weights are {dict(weights)}; give a source a positive weight"
        )
    return {name: weight / total for name, weight in weights.items()}


def _check_sources(sizes: Mapping[str, int], shares: Mapping[str, float]) -> None:
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"sizes[{name!r}] is {size}, expected a count")
    for name, share in shares.items():
        if name not in sizes:
            raise ValueError(f"weights names {name!r}, but the sources are {sorted(sizes)}")
        if share > 0 and sizes[name] == 0:
            raise ValueError(f"source {name!r} is empty but has weight {share:g}: give it weight 0")


def _stream(name: str, epoch: int) -> int:
    # by name, not by place: adding a source leaves the others' permutations as they were
    digest = hashlib.sha256(f"{epoch}:{name}".encode()).digest()
    # odd, hence never stream 0, which chooses the sources
    return int.from_bytes(digest[:8], "little") | 1


def _words(seed: int, *, stream: int, block: int, count: int) -> np.ndarray:
    # the block sits in the counter's highest word, so blocks cannot overlap
    philox = np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64),
        counter=np.array([0, 0, 0, block], dtype=np.uint64),
    )
    return philox.random_raw(count)
