"""What a run will do, known before it starts: the model, steps and work of every stage."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import AutoConfig, PretrainedConfig

from .flops import TrainingCost, cost_of_config
from .model import check_kernels
from .recipe.schema import ModelSource, Recipe, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StagePlan:
    """One stage. base is the config that its model starts from, config the one after growth."""

    index: int
    spec: Stage
    base: PretrainedConfig
    config: PretrainedConfig
    steps: int
    cost: TrainingCost
    # an estimate, for the progress bar
    flops: int


def outline(
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerBase",
    pairs_per_token: Callable[[Stage], float],
) -> list[StagePlan]:
    """Return the plans of all stages.

    Args:
        pairs_per_token: keys that a token of a stage's mixture attends to, on average.

    Raises:
        ValueError: a model has fewer embeddings than the tokenizer has tokens, or does not take
            the kernels.
    """
    plans: list[StagePlan] = []
    for index, spec in enumerate(recipe.stages):
        base = _base_config(spec.model, tokenizer, plans[-1].config if plans else None)
        config = _grown_config(base, spec.model)
        if config.vocab_size < len(tokenizer):
            raise ValueError(
                f"stages[{index}].model has vocab_size {config.vocab_size}, but the tokenizer has "
                f"{len(tokenizer)} tokens; take the model's own tokenizer (tokenizer.path)"
            )
        steps, cost = -(-spec.tokens // spec.batch_tokens), cost_of_config(config)
        flops = cost.flops(tokens=spec.tokens, pairs=round(spec.tokens * pairs_per_token(spec)))
        plans.append(StagePlan(index, spec, base, config, steps, cost, flops))
        check_kernels(plans[-1])
    return plans


def _base_config(
    source: ModelSource,
    tokenizer: "PreTrainedTokenizerBase",
    previous: PretrainedConfig | None,
) -> PretrainedConfig:
    if source.from_ == "previous":
        assert previous is not None
        return previous
    if source.from_ != "scratch":
        return AutoConfig.from_pretrained(source.from_)
    ours = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return AutoConfig.for_model(**(ours | (source.config or {})))


def _grown_config(config: PretrainedConfig, source: ModelSource) -> PretrainedConfig:
    operator = source.operator()
    if operator is None:
        return config
    plan = operator.plan(config.to_dict())
    return type(config).from_dict(plan.grown_config(config.to_dict()))
