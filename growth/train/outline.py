"""What a run will do, known before it starts: the model, steps and work of every stage."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, PretrainedConfig

from ..sparse import sparsify
from ..sparse.files import without_entry
from .flops import TrainingCost, cost_of_config
from .model import check_kernels, model_of_config
from .recipe.schema import ModelSource, Recipe, Stage
from .teacher_config import teacher_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StagePlan:
    """One stage. base is the config that its model starts from.

    config is the one after growth, and says which layers are sparse.
    """

    index: int
    spec: Stage
    base: PretrainedConfig
    config: PretrainedConfig
    steps: int
    cost: TrainingCost
    # of the objective's teacher, where it has one
    teacher: PretrainedConfig | None
    teacher_cost: TrainingCost | None
    pairs_per_token: float

    def flops_of(self, *, tokens: int, pairs: int, taught: bool) -> int:
        """Return the work of a step: the model's, and the forward of its teacher."""
        work = self.cost.flops(tokens=tokens, pairs=pairs)
        if taught and self.teacher_cost:
            # one of the three passes of training
            work += self.teacher_cost.flops(tokens=tokens, pairs=pairs) // 3
        return work

    @property
    def flops(self) -> int:
        """An estimate for the whole stage, for the progress bar."""
        tokens = self.spec.tokens
        pairs = round(tokens * self.pairs_per_token)
        share = getattr(self.spec.objective, "transition", 1.0)
        plain = self.flops_of(tokens=tokens, pairs=pairs, taught=False)
        return plain + round(
            share * (self.flops_of(tokens=tokens, pairs=pairs, taught=True) - plain)
        )


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
            the kernels or the sparse layers, or a teacher does not fit to it.
    """
    plans: list[StagePlan] = []
    for index, spec in enumerate(recipe.stages):
        base = _base_config(spec.model, tokenizer, plans[-1].config if plans else None)
        config = _sparse_config(_grown_config(_dense(base, spec), spec.model), spec, index)
        if config.vocab_size < len(tokenizer):
            raise ValueError(
                f"stages[{index}].model has vocab_size {config.vocab_size}, but the tokenizer has "
                f"{len(tokenizer)} tokens; take the model's own tokenizer (tokenizer.path)"
            )
        teacher = teacher_config(
            spec, config, plans[-1].config if plans else None, tokenizer, place=f"stages[{index}]"
        )
        plans.append(
            StagePlan(
                index=index,
                spec=spec,
                base=base,
                config=config,
                steps=-(-spec.tokens // spec.batch_tokens),
                cost=cost_of_config(config),
                teacher=teacher,
                teacher_cost=cost_of_config(teacher) if teacher else None,
                pairs_per_token=pairs_per_token(spec),
            )
        )
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


def _dense(config: PretrainedConfig, stage: Stage) -> PretrainedConfig:
    return without_entry(config) if stage.exports else config


def _sparse_config(config: PretrainedConfig, stage: Stage, index: int) -> PretrainedConfig:
    rule = stage.rule()
    if rule is None:
        return config
    with torch.device("meta"):
        model = model_of_config(config)
    try:
        sparsify(model, rule)
    except ValueError as error:
        raise ValueError(f"stages[{index}].sparsity: {error}") from None
    config = copy.deepcopy(config)
    config.apical = model.config.apical
    return config


def _grown_config(config: PretrainedConfig, source: ModelSource) -> PretrainedConfig:
    operator = source.operator()
    if operator is None:
        return config
    plan = operator.plan(config.to_dict())
    return type(config).from_dict(plan.grown_config(config.to_dict()))
