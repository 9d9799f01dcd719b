"""Tokenizer and text of a run, loaded before anything is trained."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..continual import Mixture, token_weights
from .data.batches import predicted_tokens
from .data.cache import cache_dir
from .data.corpora import build_corpus
from .data.packing import BatchStream, eval_batches
from .data.source import Split, TokenSource, load_source, source_texts
from .data.tokenizer import load_tokenizer, train_tokenizer
from .evaluate import HeldOut
from .recipe.schema import Recipe, Source, Stage


class Inputs:
    """What the stages of a recipe read; loading it finds every mistake in the data.

    Raises:
        ValueError, OSError: a source or the tokenizer cannot be read.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._cache = recipe, cache_dir()
        self.tokenizer = self._load_tokenizer()
        # by name, split and context
        self._loaded: dict[tuple[str, Split, int], TokenSource] = {}
        for stage in recipe.stages:
            self._mixed(stage)
            self.held_out(stage)
        # what identifies the data of this run
        self.description = self._describe()

    def stream(
        self,
        stage: Stage,
        *,
        seed: int,
        choose: Callable[[TokenSource], TokenSource] | None = None,
    ) -> BatchStream:
        """Return the batches of a stage, from the first on.

        Args:
            stage: of the recipe.
            seed: of the draws.
            choose: returns what of a source is read; everything where it is None.
        """
        sources = self._mixed(stage)
        if choose is not None:
            sources = {name: choose(source) for name, source in sources.items()}
        lengths = {name: float(source.lengths.mean()) for name, source in sources.items()}
        shares = {name: stage.data[name] for name in sources}
        sizes = {name: len(source) for name, source in sources.items()}
        mixture = Mixture(sizes=sizes, weights=token_weights(shares, lengths), seed=seed)
        return BatchStream(sources, mixture, batch_tokens=stage.batch_tokens)

    def held_out(self, stage: Stage) -> dict[str, HeldOut]:
        """Return the text that a stage is evaluated on, by source."""
        return {
            name: self._held_out(self._source(name, "val", stage.context), stage)
            for name in stage.evaluate or self._recipe.sources
        }

    def pairs_per_token(self, stage: Stage) -> float:
        """Return how many keys a token of the mixture attends to, on average."""
        total = sum(stage.data.values())
        return sum(
            stage.data[name] / total * _pairs_per_token(source.lengths)
            for name, source in self._mixed(stage).items()
        )

    def check(self, described: Mapping[str, Any]) -> None:
        """Check that the data is what a checkpoint was trained on.

        Raises:
            ValueError: it is not.
        """
        present = self.description["tokens"]
        changed = [key for key, value in described["tokens"].items() if present.get(key) != value]
        if changed:
            raise ValueError(
                f"the text or the tokens of {changed[0]} changed since the run was started (new "
                "files, or other versions of the packages); start a new run with --output"
            )

    def _describe(self) -> dict[str, Any]:
        tokens = {
            f"{name}, {split}, context {context}": {
                "documents": source.n_documents,
                "bytes": source.n_bytes,
                "tokens": int(source.lengths.sum()),
                "sha256": source.fingerprint,
            }
            for (name, split, context), source in self._loaded.items()
        }
        corpora = {
            name: {"corpus": spec.corpus, "manifest_sha256": self._manifest(spec)}
            for name, spec in self._recipe.sources.items()
            if spec.corpus
        }
        return {"vocabulary": len(self.tokenizer), "corpora": corpora, "tokens": tokens}

    def _load_tokenizer(self) -> Any:
        spec = self._recipe.tokenizer
        if spec.path:
            return load_tokenizer(spec.path)
        texts = [
            text
            for name in spec.train_on or ()
            for text in source_texts(
                name, self._recipe.sources[name], split="train", cache=self._cache
            )
        ]
        assert spec.vocab_size is not None
        return train_tokenizer(texts, vocab_size=spec.vocab_size, cache=self._cache)

    def _mixed(self, stage: Stage) -> dict[str, TokenSource]:
        return {
            name: self._source(name, "train", stage.context)
            for name, share in stage.data.items()
            if share > 0
        }

    def _source(self, name: str, split: Split, context: int) -> TokenSource:
        key = (name, split, context)
        if key not in self._loaded:
            self._loaded[key] = load_source(
                name,
                self._recipe.sources[name],
                self.tokenizer,
                split=split,
                context=context,
                cache=self._cache,
            )
        return self._loaded[key]

    def _held_out(self, source: TokenSource, stage: Stage) -> HeldOut:
        batches = eval_batches(
            source, tokens=stage.evaluate_tokens, batch_tokens=stage.batch_tokens
        )
        tokens = sum(predicted_tokens(batch) for batch in batches)
        return HeldOut(batches, tokens, source.bytes_per_token)

    def _manifest(self, spec: Source) -> str:
        assert spec.corpus is not None
        corpus = build_corpus(spec.corpus, cache=self._cache, max_bytes=spec.max_bytes)
        return hashlib.sha256(Path(corpus, "manifest.json").read_bytes()).hexdigest()


def _pairs_per_token(lengths: np.ndarray) -> float:
    return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())
