"""What a stage minimises. A new one is a class here and a line in `train/objective.py`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from .fields import Count, Fraction, NotNegative, Positive, Strict

# a share that may be everything, and may not be nothing
Share = Annotated[float, Field(gt=0, le=1)]


class _Objective(Strict):
    # no soft cap: the moments of the logits, not the logits, are what it computes
    linear_logits: ClassVar[bool] = False

    @property
    def teacher_directory(self) -> str | None:
        """The checkpoint directory that the teacher comes from."""
        return None


class Causal(_Objective):
    """Next-token prediction."""

    kind: Literal["causal"] = "causal"
    z_loss: NotNegative = 0.0


class Selection(Strict):
    """Train on the share `keep` of every source's pieces that SALT scores highest."""

    keep: Share
    top_k: Count = 10


class SaltObjective(_Objective):
    """Distillation from a small model for the share `transition` of the steps, then causal."""

    kind: Literal["salt"]
    # previous, or a checkpoint directory
    teacher: Annotated[str, Field(min_length=1)]
    # 36 000 of about 208 000 steps in the paper
    transition: Share = 0.17
    omega: Share = 2 / 3
    rho: Positive = 0.25
    top_k: Count = 10
    tail: Literal["drop", "label"] = "drop"
    select: Selection | None = None
    z_loss: NotNegative = 0.0

    @property
    def teacher_directory(self) -> str | None:
        """The checkpoint directory that the teacher comes from; None for the previous stage."""
        return None if self.teacher == "previous" else self.teacher


class SelfDistillationObjective(_Objective):
    """Distillation from the model as it was when the stage began, or from its running mean."""

    kind: Literal["self_distillation"]
    decay: Annotated[float, Field(ge=0, le=1)] = 1.0
    omega: Share = 0.5
    rho: Positive = 1.0
    top_k: Count = 10
    tail: Literal["drop", "label"] = "label"
    z_loss: NotNegative = 0.0


class ReweightedObjective(_Objective):
    """Documents weighted by their losses; `burn_in` is a fraction of the stage's steps."""

    kind: Literal["reweighted"]
    strategy: Literal["linupper", "quadratic", "extremes"] = "linupper"
    temperature: Positive = 1.0
    final_temperature: Positive | None = None
    # 1000 of 20 000 steps in the released code
    burn_in: Fraction = 0.05
    z_loss: NotNegative = 0.0


class EmoObjective(_Objective):
    """Cross-entropy and earth mover's distance over the embeddings that the stage begins with."""

    kind: Literal["emo"]
    cost: Literal["frozen", "current"] = "frozen"
    mode: Annotated[int, Field(ge=1, le=2)] = 1
    clamp: Positive | None = 3.0
    exclude_own_mass: bool = False
    z_loss: NotNegative = 0.0


class SphericalZObjective(_Objective):
    """The Z-loss of the spherical family; held-out losses remain those of a softmax."""

    linear_logits = True
    kind: Literal["spherical_z"]
    sharpness: Positive = 0.1
    location: float = 10.0


class TaylorSoftmaxObjective(_Objective):
    """Next-token prediction with 1 + o + o^2 / 2 where softmax has exp(o)."""

    linear_logits = True
    kind: Literal["taylor_softmax"]


class SphericalSoftmaxObjective(_Objective):
    """Next-token prediction with o^2 + offset where softmax has exp(o)."""

    linear_logits = True
    kind: Literal["spherical_softmax"]
    offset: Positive


def _causal_by_default(value: Any) -> Any:
    return {"kind": "causal", **value} if isinstance(value, dict) else value


Objective = Annotated[
    Causal
    | SaltObjective
    | SelfDistillationObjective
    | ReweightedObjective
    | EmoObjective
    | SphericalZObjective
    | TaylorSoftmaxObjective
    | SphericalSoftmaxObjective,
    Field(discriminator="kind"),
    BeforeValidator(_causal_by_default),
]
