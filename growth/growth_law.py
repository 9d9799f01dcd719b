"""When to grow, and by how much: the law of Stacking Your Transformers, and what it saves."""

import math
from dataclasses import dataclass

# what the authors fix; 2 to 4 are close
GROWTH_FACTOR = 4
_GOOD_FACTORS = (2, 4)
# target parameters of the runs it was fitted to, those of the authors' table, tokens tried
_FITTED = (4.1e8, 3e9)
_LARGEST_SHOWN = 7e10
_TRIED = (1e9, 5e10)
# parameters, tokens without growth, tokens with growth to the same loss
_MEASURED = (7e9, 3e11, 1.94e11)


@dataclass(frozen=True)
class GrowthTiming:
    """A run that grows once, and what it costs beside one that has its final size throughout.

    Args:
        params: N, of the grown model.
        tokens: D, that the run sees in all.
        factor: g, how many times deeper the grown model is.
        small_params: of the model before growth.
        growth_tokens: d, that the small model sees.
        notes: where the law was not fitted or tried, one sentence each.
    """

    params: float
    tokens: float
    factor: int
    small_params: float
    growth_tokens: float
    notes: tuple[str, ...] = ()

    @property
    def scratch_flops(self) -> float:
        """FLOPs of training the large model on all tokens."""
        return training_flops(self.params, self.tokens)

    @property
    def small_flops(self) -> float:
        """FLOPs of training the small model."""
        return training_flops(self.small_params, self.growth_tokens)

    @property
    def large_flops(self) -> float:
        """FLOPs of training the grown model on the tokens that are left."""
        return training_flops(self.params, self.tokens - self.growth_tokens)

    @property
    def saved(self) -> float:
        """Share of `scratch_flops` that is not spent, for the same number of tokens."""
        return 1 - (self.small_flops + self.large_flops) / self.scratch_flops

    def __str__(self) -> str:
        params, tokens, same = _MEASURED
        return "\n".join(
            [
                f"target        {_count(self.params)} parameters, {_count(self.tokens)} tokens",
                f"small model   1/{self.factor} of the layers, "
                f"{_count(self.small_params)} parameters",
                f"grow after    d = {_count(self.growth_tokens)} tokens of the small model, "
                f"then {_count(self.tokens - self.growth_tokens)} of the large one",
                f"how           apical grow SRC OUT stack --factor {self.factor}",
                f"FLOPs         {self.small_flops:.3g} small + {self.large_flops:.3g} large; "
                f"{self.scratch_flops:.3g} from scratch",
                f"saved         {self.saved:.2%} for the same tokens",
                f"same loss     not predicted; the paper saw {_count(params)} parameters reach in "
                f"{_count(same)} tokens what took {_count(tokens)} ({1 - same / tokens:.0%} fewer)",
                *(f"note: {note}" for note in self.notes),
            ]
        )


def training_flops(params: float, tokens: float) -> float:
    """Return the FLOPs of training, 6 per parameter and token (arXiv 2001.08361, section 2.1)."""
    return 6.0 * params * tokens


def stacking_tokens(params: float, flops: float) -> float:
    """Return d, the tokens to train the small model on before its layers are stacked.

    log10(d) = 0.88 log10(N) + 163.27 / log10(C) - 5.74

    Args:
        params: N, of the model after growth, embeddings included.
        flops: C, of training that model from scratch, 6 N D.

    Raises:
        ValueError: an argument is not a number above 1.

    Source: Stacking Your Transformers, arXiv 2405.15319, as in the README of the authors' code
        (github.com/tongxuluo/prts), whose four examples it gives to all digits printed.
    """
    for name, value in (("params", params), ("flops", flops)):
        _check_number(name, value)
    return 10 ** (0.88 * math.log10(params) + 163.27 / math.log10(flops) - 5.74)


def plan_growth(
    params: float,
    *,
    tokens: float | None = None,
    flops: float | None = None,
    factor: int = GROWTH_FACTOR,
    small_params: float | None = None,
) -> GrowthTiming:
    """Return when to grow a run, and what that costs.

    Args:
        params: N, of the model after growth, embeddings included.
        tokens, flops: one of them: D, or C = 6 N D of training from scratch.
        factor: g, how many times deeper the grown model is.
        small_params: of the model before growth; params / factor unless given, which is less than
            it has, since embeddings do not grow.

    Raises:
        ValueError: an argument is out of its range, or the law puts growth behind the end of the
            run, as it does for small ones, which it was not fitted to.

    Source: Stacking Your Transformers, arXiv 2405.15319.
    """
    if (tokens is None) == (flops is None):
        raise ValueError(f"tokens is {tokens} and flops is {flops}; expected one of them")
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 2:
        raise ValueError(f"factor is {factor!r}; expected an integer of at least 2")
    _check_number("params", params)
    if tokens is None:
        assert flops is not None
        _check_number("flops", flops)
        tokens = flops / training_flops(params, 1)
    _check_number("tokens", tokens)
    small = params / factor if small_params is None else small_params
    if not 0 < small < params:
        raise ValueError(f"small_params is {small:g}; expected fewer than params, {params:g}")
    growth = stacking_tokens(params, training_flops(params, tokens))
    if growth >= tokens:
        raise ValueError(
            f"params is {params:g} and tokens {tokens:g}, for which the law says to grow after "
            f"{growth:.3g} tokens, behind the end; it was fitted to {_FITTED[0]:g} parameters and "
            f"more, with d of {_TRIED[0]:g} tokens and more: for a smaller run, choose d by trial"
        )
    notes = tuple(_notes(params, growth, factor))
    return GrowthTiming(params, tokens, factor, small, growth, notes)


def _notes(params: float, growth: float, factor: int) -> list[str]:
    notes = []
    low, high = _FITTED
    if not low <= params <= high:
        shown = high < params <= _LARGEST_SHOWN
        notes.append(
            f"extrapolated: {_count(params)} parameters are outside of the fit, {_count(low)} to "
            f"{_count(high)}" + ("; the authors give examples up to 70 B" if shown else "")
        )
    if not _TRIED[0] <= growth <= _TRIED[1]:
        notes.append(f"extrapolated: d of {_count(_TRIED[0])} to {_count(_TRIED[1])} were tried")
    if not _GOOD_FACTORS[0] <= factor <= _GOOD_FACTORS[1]:
        notes.append(f"factor {factor}: the authors fix 4, and 2 to 4 are close")
    return notes


def _check_number(name: str, value: float) -> None:
    if not 1 < value < math.inf:
        raise ValueError(f"{name} is {value:g}; expected a number above 1, such as 7e9")


def _count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        # also what rounds up to the unit
        if value >= 0.9995 * size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"
