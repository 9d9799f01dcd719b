"""Whether a teacher can teach: known before the run starts, without its weights."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig, PretrainedConfig

from .data.tokenizer import load_tokenizer
from .recipe.objective import SaltObjective, SelfDistillationObjective
from .recipe.schema import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def teacher_config(
    stage: Stage,
    config: PretrainedConfig,
    previous: PretrainedConfig | None,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    place: str,
) -> PretrainedConfig | None:
    """Return the config of a stage's teacher; None where its objective has none.

    Args:
        stage: of the recipe.
        config: of the stage's model, after growth.
        previous: of the stage before.
        tokenizer: of the run.
        place: of the stage in the recipe, for messages.

    Raises:
        ValueError: the teacher has another vocabulary, or a shorter context.
    """
    objective = stage.objective
    if not isinstance(objective, SaltObjective | SelfDistillationObjective):
        return None
    directory = objective.teacher_directory
    if directory is not None:
        teacher = AutoConfig.from_pretrained(directory)
        _check_tokenizer(directory, tokenizer, place)
    else:
        teacher = config if objective.kind == "self_distillation" else previous
    assert teacher is not None
    _check_sizes(stage, config, teacher, len(tokenizer), place)
    select = objective.select if isinstance(objective, SaltObjective) else None
    wanted = max(objective.top_k, select.top_k if select else 0)
    if wanted > teacher.vocab_size:
        raise ValueError(
            f"{place}.objective: top_k is {wanted}, but the teacher has {teacher.vocab_size} tokens"
        )
    return teacher


def _check_tokenizer(directory: str, tokenizer: "PreTrainedTokenizerBase", place: str) -> None:
    # weights alone are taken at their word
    written = Path(directory, "tokenizer.json").is_file()
    if written and load_tokenizer(directory).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{place}.objective.teacher {directory} has another tokenizer than the run; take its "
            f"own (tokenizer: {{path: {directory}}})"
        )


def _check_sizes(
    stage: Stage, config: PretrainedConfig, teacher: PretrainedConfig, tokens: int, place: str
) -> None:
    if not tokens <= teacher.vocab_size <= config.vocab_size:
        raise ValueError(
            f"{place}.objective: the teacher has vocab_size {teacher.vocab_size}, expected from "
            f"the tokenizer's {tokens} to the model's {config.vocab_size}"
        )
    longest = getattr(teacher, "max_position_embeddings", None)
    if longest is not None and stage.context > longest:
        raise ValueError(
            f"{place}.context is {stage.context}, above the teacher's max_position_embeddings "
            f"{longest}"
        )
