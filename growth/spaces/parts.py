"""What tables are made of: linear layers and layer norms, by their spaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .table import Config, Weight

Weights = Mapping[str, Weight]
When = str | Callable[[Config], bool]


def linear(
    name: str,
    out: str,
    into: str,
    *,
    bias: When | None = None,
    residual: bool = False,
    transposed: bool = False,
    optional: bool = False,
    when: When = "",
) -> dict[str, Weight]:
    """Return a linear layer's weights.

    Args:
        name: of the layer.
        out, into: the spaces that it writes and reads.
        bias: None: it has none; empty: always; else the condition for it.
        residual: its output is added to the residual stream.
        transposed: the weight is (in, out), transformers' Conv1D.
        optional, when: as of `Weight`.
    """
    axes = (f"<{into}", out) if transposed else (out, f"<{into}")
    weights = {f"{name}.weight": Weight(axes, residual, when, optional=optional)}
    if bias is not None:
        weights[f"{name}.bias"] = Weight((out,), residual, bias or when, optional=optional)
    return weights


def layer_norm(
    name: str,
    out: str,
    of: str,
    *,
    bias: bool = True,
    when: When = "",
    optional: bool = False,
) -> dict[str, Weight]:
    """Return the weights of a norm over `of` that writes `out`."""
    weights = {f"{name}.weight": Weight((out,), when=when, norm=of, optional=optional)}
    if bias:
        weights[f"{name}.bias"] = Weight((out,), when=when, optional=optional)
    return weights
