"""What a model costs to train: bytes of weights and optimizer, and operations per token."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from apical._extras import require

from ._dense import is_dense
from .convert import replaced
from .layers import SparseLowRankLinear, StructuredLinear
from .rules import SparseLowRank

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# bfloat16 weights and both of Adam's moments
_BYTES_PER_PARAMETER = 6


class Published(NamedTuple):
    """A model of SLTrain's experiments, and the layers in it.

    Source: Han et al. 2024 (SLTrain, arXiv 2406.02214), configurations and scripts of its code.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    rank: int
    density: float
    alpha: float

    def config(self) -> "PretrainedConfig":
        """Return the model's configuration: Llama with 32 000 words and a head of its own."""
        transformers = require("transformers", extra="hf", what="a published configuration")
        shape = self._asdict()
        sizes = {name: shape[name] for name in self._fields[:4]}
        return transformers.LlamaConfig(vocab_size=32_000, tie_word_embeddings=False, **sizes)

    def rule(self) -> SparseLowRank:
        """Return the rule that makes it SLTrain's model."""
        return SparseLowRank(rank=self.rank, density=self.density, alpha=self.alpha, init="sltrain")


SLTRAIN = {
    "60M": Published(512, 8, 8, 1376, rank=128, density=0.03, alpha=32),
    "130M": Published(768, 12, 12, 2048, rank=256, density=0.03, alpha=16),
    "350M": Published(1024, 24, 16, 2736, rank=256, density=0.03, alpha=16),
    "1B": Published(2048, 24, 32, 5461, rank=512, density=0.03, alpha=8),
    "7B": Published(4096, 32, 32, 11008, rank=1024, density=0.05, alpha=8),
}


@dataclass(frozen=True)
class Memory:
    """Numbers of a model: all its parameters, and the sparse entries among them."""

    parameters: int
    stored: int

    def training_bytes(self, *, index: float = 0) -> int:
        """Return the bytes of bfloat16 weights and two moments of Adam, and of an index.

        Gradients, activations and what kernels derive from a seed are not among them.

        Args:
            index: bytes for the position of a stored entry that are part of the model's state:
                0 where a seed says it, 8 in SLTrain's code.
        """
        return round(_BYTES_PER_PARAMETER * self.parameters + index * self.stored)


def memory(model: nn.Module) -> Memory:
    """Return how many parameters a model has, tied ones once; it may be on the meta device."""
    layers = set(replaced(model).values())
    sparse = (layer for layer in layers if isinstance(layer, SparseLowRankLinear))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Memory(parameters, sum(layer.support.stored for layer in sparse))


def index_bytes(model: nn.Module, device: str = "cpu") -> int:
    """Return the bytes of all positions that kernels hold while the model runs on a device.

    They are derived from the seeds on first use and are in no checkpoint. Counting draws them.

    Args:
        model: a converted model; it may be on the meta device.
        device: "cpu", whose kernels also go by columns, or "cuda".
    """
    layers = set(replaced(model).values())
    supports = [layer.support for layer in layers if isinstance(layer, SparseLowRankLinear)]
    # the meta device counts for any but the CPU, and holds nothing
    there = torch.device("cpu" if device == "cpu" else "meta")
    indices = [support.index("cpu").to(there) for support in supports]
    return sum(part.nbytes for index in indices for part in index)


def flops_per_token(model: nn.Module, tokens: int) -> int:
    """Return the operations of one token's forward pass in a sequence of `tokens`.

    Two for each multiply-add of linear layers (the head too, embeddings not) and of attention, as
    if every token attended to all: 4 T d a layer, for d = heads times head size. Layers that run
    more than once for a token, such as shared ones, count as often as they have a name.

    Args:
        model: a transformers model, converted or not; it may be on the meta device.
        tokens: length of the sequence, T.

    Source: Thangarasa et al. 2023 (SPDF, arXiv 2303.10464), appendix; its count of attention.
    """
    config: Any = model.config
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    attention = 4 * tokens * config.num_hidden_layers * heads * head_size
    return attention + sum(_linear_flops(module) for module in modules)


def _linear_flops(module: nn.Module) -> int:
    if isinstance(module, StructuredLinear):
        return module.flops(1)
    # a subclass of nn.Linear multiplies as its parent does
    if is_dense(module) or isinstance(module, nn.Linear):
        return 2 * module.weight.numel()
    return 0
