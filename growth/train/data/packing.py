"""Batches without padding: pieces of documents side by side, with their boundaries."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....packing import document_bounds, position_ids
from ...continual.mixture import Mixture
from .source import TokenSource

_IGNORED = -100


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Pieces one after the other; no token sees or predicts one of another piece.

    Labels are the tokens themselves, as transformers shifts them, and -100 at the first token
    of each piece, which nothing before it predicts.

    Shapes: input_ids, labels, position_ids (1, T) int64; cu_seqlens (N+1,) int32; N sources.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    sources: list[str]

    def model_inputs(self, *, packed: bool) -> dict[str, Any]:
        """Return the arguments of a transformers model's forward.

        Args:
            packed: also give the boundaries to an attention that takes them; otherwise
                transformers finds them in the position ids.
        """
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
            # with a cache, transformers takes the whole batch for one document
            "use_cache": False,
        }
        if packed:
            inputs |= {
                "cu_seq_lens_q": self.cu_seqlens,
                "cu_seq_lens_k": self.cu_seqlens,
                "max_length_q": self.max_seqlen,
                "max_length_k": self.max_seqlen,
            }
        return inputs


class BatchStream:
    """Batches of at most `batch_tokens` tokens, drawn from a mixture without an end.

    A piece that does not fit waits for the next batch, so packing changes no source's share.
    The position is the mixture's: from a saved state come the same batches.

    Args:
        sources: by the names and with the sizes that the mixture knows.
        mixture: what to draw, and where the stream stands.
        batch_tokens: at least the longest piece.

    Raises:
        ValueError: a piece is longer than `batch_tokens`, or sources and mixture disagree.
    """

    def __init__(
        self, sources: Mapping[str, TokenSource], mixture: Mixture, *, batch_tokens: int
    ) -> None:
        sizes = {name: len(source) for name, source in sources.items()}
        if sizes != mixture.sizes:
            raise ValueError(f"sources have {sizes} pieces, the mixture knows {mixture.sizes}")
        for source in sources.values():
            _check_lengths(source, batch_tokens)
        self._sources = dict(sources)
        self._mixture = mixture
        self._batch_tokens = batch_tokens

    def next(self) -> PackedBatch:
        """Return the next batch and move on."""
        names: list[str] = []
        pieces: list[np.ndarray] = []
        room = self._batch_tokens
        while True:
            name, index = self._mixture.peek()
            room -= int(self._sources[name].lengths[index])
            if room < 0:
                return pack(pieces, names)
            self._mixture.draw()
            names.append(name)
            pieces.append(self._sources[name].piece(index))

    def state(self) -> dict[str, Any]:
        """Return the position, a few integers."""
        return {"mixture": self._mixture.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state` returned.

        Raises:
            ValueError: the state is of other sources, or damaged.
        """
        self._mixture.load(state["mixture"])


def eval_batches(source: TokenSource, *, tokens: int, batch_tokens: int) -> list[PackedBatch]:
    """Return the first pieces of a source, in order: at most `tokens` tokens, at least a piece.

    Raises:
        ValueError: a piece is longer than `batch_tokens`, or the source is empty.
    """
    _check_lengths(source, batch_tokens)
    if len(source) == 0:
        raise ValueError(f"source {source.name!r} is empty: there is nothing to evaluate on")
    count = max(1, int(np.searchsorted(np.cumsum(source.lengths), tokens, side="right")))
    return list(in_order(source, pieces=count, batch_tokens=batch_tokens))


def in_order(source: TokenSource, *, pieces: int, batch_tokens: int) -> Iterator[PackedBatch]:
    """Yield the first pieces of a source, at most `batch_tokens` tokens at a time."""
    waiting: list[np.ndarray] = []
    for index in range(pieces):
        piece = source.piece(index)
        if sum(map(len, waiting)) + len(piece) > batch_tokens:
            yield pack(waiting, [source.name] * len(waiting))
            waiting = []
        waiting.append(piece)
    yield pack(waiting, [source.name] * len(waiting))


def pack(pieces: Sequence[np.ndarray], sources: Sequence[str]) -> PackedBatch:
    """Return pieces as one batch.

    Shapes: each piece (tokens,) int64, at least one of them.
    """
    lengths = [len(piece) for piece in pieces]
    bounds = document_bounds(lengths)
    ids = torch.from_numpy(np.concatenate(pieces))
    labels = ids.clone()
    labels[bounds[:-1].long()] = _IGNORED
    return PackedBatch(
        input_ids=ids[None],
        labels=labels[None],
        position_ids=position_ids(lengths)[None],
        cu_seqlens=bounds,
        max_seqlen=max(lengths),
        sources=list(sources),
    )


def _check_lengths(source: TokenSource, batch_tokens: int) -> None:
    longest = int(source.lengths.max(initial=0))
    if longest > batch_tokens:
        raise ValueError(
            f"batch_tokens is {batch_tokens}, but source {source.name!r} has a piece of "
            f"{longest} tokens: raise batch_tokens or shorten the context"
        )
