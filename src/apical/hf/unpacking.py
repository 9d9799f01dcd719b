"""Cache layers that take the keys of packed prompts in and lay them out as a padded batch."""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class Places:
    """Where the tokens of one packed row stand in the padded batch."""

    def __init__(
        self,
        rows: Tensor,  # (T,) int64
        columns: Tensor,  # (T,) int64, among `count`
        count: int,
        device: torch.device,
    ) -> None:
        self.rows, self.columns, self.count, self.device = rows, columns, count, device
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def among(self, width: int) -> tuple[Tensor, Tensor]:
        """Return tokens that stand in the last `width` columns, and their places among B * width.

        Worked out once for all layers of a width.
        """
        if width not in self.found:
            column = self.columns - (self.count - width)
            tokens = (column >= 0).nonzero().squeeze(1)
            places = self.rows[tokens] * width + column[tokens]
            self.found[width] = tokens.to(self.device), places.to(self.device)
        return self.found[width]


class Unpacking(DynamicLayer):
    """A layer that is always empty to the model, and keeps what it is given as a padded batch.

    Args:
        layer: the layer of a stock cache that will take over what is kept.
        batch: rows of the padded batch.
        columns: its columns.

    Raises:
        NotImplementedError: `layer` holds something else than one key and one value per token.
    """

    def __init__(self, layer: object, *, batch: int, columns: int) -> None:
        super().__init__()
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise NotImplementedError(
                f"a cache with a {type(layer).__name__} cannot be filled from packed prompts;"
                " prefill this model as a padded batch"
            )
        self.batch = batch
        # a cache without the last column must be full as well
        self.width = 1 + last_columns(layer, columns - 1)
        self.places: Places | None = None
        self.stored: tuple[Tensor, Tensor] | None = None  # (B, K, width, D) each

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keep the states (1, K, T, D) of a packed row and return them as they are."""
        assert self.places is not None
        if self.stored is None:
            self.stored = self._empty(key_states), self._empty(value_states)
        tokens, places = self.places.among(self.width)
        for stored, states in zip(self.stored, (key_states, value_states), strict=True):
            packed = states[0].transpose(0, 1)  # (T, K, D)
            if len(tokens) < len(packed):
                packed = packed.index_select(0, tokens)
            stored.transpose(1, 2).flatten(0, 1).index_copy_(0, places, packed)
        return key_states, value_states

    def _empty(self, states: Tensor) -> Tensor:
        # tokens outside of heads, as the projections return them: each token is copied as one piece
        _, heads, _, size = states.shape
        return states.new_zeros(self.batch, self.width, heads, size).transpose(1, 2)


def last_columns(layer: object, columns: int) -> int:
    """Return how many of so many columns a layer keeps."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return min(columns, layer.sliding_window - 1)
    return columns
