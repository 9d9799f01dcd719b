"""What training costs, counted in floating-point operations of the matrix products."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from ..sparse import StructuredLinear
from .model import model_of_config


@dataclass(frozen=True)
class TrainingCost:
    """What one token costs in the weights, and one attended pair of tokens in attention.

    Training takes three passes of the forward's products (forward, gradient of the input,
    gradient of the weight), each multiply-add is 2 operations:

        flops = 6 * weights * tokens + 12 * attention * pairs

    weights: the weights of all matrices that every token is multiplied with, the head included
    (also when it is tied to the embedding), the embedding not: it is a look-up. A sparse layer
    counts the weights that it multiplies with, by its own `flops`.
    attention: L * H * D (layers, query heads, head size): the scores and the weighted sum of the
    values are 2 products of 2 * D operations each for every head and pair; times 3, as above.
    pairs: tokens times the mean number of keys that a token attends to; a causal document of n
    tokens has n * (n + 1) / 2. Norms, activations, the softmax and the optimizer are not counted.

    Source: arXiv 2001.08361, section 2.1 (C = 6 N), with the attention written out.
    """

    weights: int
    attention: int

    def flops(self, *, tokens: int, pairs: int) -> int:
        return 6 * self.weights * tokens + 12 * self.attention * pairs


def training_cost(model: nn.Module, config: PretrainedConfig) -> TrainingCost:
    """Return the cost of training a causal language model whose matrices are linear layers."""
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return TrainingCost(
        weights=sum(_weights(module) for module in model.modules()),
        attention=config.num_hidden_layers * heads * head_size,
    )


def cost_of_config(config: PretrainedConfig) -> TrainingCost:
    """Return the cost of training a model that is not built yet; nothing is allocated."""
    with torch.device("meta"):
        return training_cost(model_of_config(config), config)


def _weights(module: nn.Module) -> int:
    if isinstance(module, StructuredLinear):
        return module.flops(1) // 2
    return module.weight.numel() if isinstance(module, nn.Linear) else 0


def causal_pairs(lengths: list[int]) -> int:
    """Return how many pairs of tokens causal attention within documents looks at."""
    return sum(n * (n + 1) // 2 for n in lengths)
