"""Width with what the next layer knows: new directions are not copies, but one layer ahead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..plan import GrowthPlan
from .widen import Widen

if TYPE_CHECKING:
    import torch

    from ..maps import SpaceMap


@dataclass(frozen=True)
class AdvancedKnowledge:
    """AKI: as `Widen` by copies, but new directions of layer l have the weights of layer l + 1.

    Copies no longer learn the same, and the paper finds faster convergence; the function changes.
    The last layer, and what is in no layer, has copies.

    Args:
        factor: multiplies hidden, ffn, heads and kv_heads; what is given below wins. 2 if
            neither it nor a size is given.
        hidden, ffn, heads, kv_heads: new sizes.

    Raises:
        ValueError: a size that is smaller than the old one, or that the model cannot have.

    Source: bert2BERT, arXiv 2110.07143, advanced knowledge initialization.
    """

    factor: float | None = None
    hidden: int | None = None
    ffn: int | None = None
    heads: int | None = None
    kv_heads: int | None = None

    def plan(self, config: Mapping[str, Any]) -> GrowthPlan:
        """Return the plan for a model with this config."""
        wider = Widen(**asdict(self)).plan(config)
        spaces = {
            name: replace(found, ahead=_copies(found)) for name, found in wider.spaces.items()
        }
        notes = ("new directions come from the next layer", *wider.notes)
        return replace(
            wider,
            operator="advanced-knowledge",
            options=asdict(self),
            spaces=spaces,
            preserves_function=False,
            notes=notes,
        )


def _copies(space: SpaceMap) -> torch.Tensor:
    """Return which new directions are a second copy, or a later one."""
    import torch

    seen: set[int] = set()
    sources = space.carries.sources().tolist()
    return torch.tensor([source in seen or seen.add(source) is not None for source in sources])
