"""The key `sparsity` of a stage: one rule with its options, or `dense`."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from .checks import make_operator
from .errors import RecipeError, shorten

if TYPE_CHECKING:
    from ...sparse import Rule
    from .schema import Stage

DENSE = "dense"
_EXPECTED = "a rule such as {sparse_low_rank: {rank: 0.25}}, or dense"


def make_rule(name: str, options: dict[str, Any] | None) -> "Rule":
    """Return a rule from its name and its options.

    Raises:
        RecipeError: the rule or an option is unknown, or an option has a wrong value.
    """
    # torch takes a second to import, and few recipes need it here
    from ...sparse import RULES

    return make_operator(name, options or {}, RULES, what="rule")


def _check(value: object) -> object:
    if value is None or value == DENSE:
        return value
    if not isinstance(value, dict):
        raise RecipeError((), f"unknown value {shorten(value)}; expected {_EXPECTED}")
    if len(value) != 1:
        raise RecipeError((), f"names {len(value)} rules, expected one")
    ((name, options),) = value.items()
    if not isinstance(options, dict | None):
        raise RecipeError((str(name),), f"expected a mapping of options, got {shorten(options)}")
    make_rule(str(name), options)
    return value


Sparsity = Annotated[dict[str, dict[str, Any] | None] | str | None, BeforeValidator(_check)]


def before_growth(stage: "Stage", config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a stage's model when it is grown, and check that it can be.

    Args:
        stage: of the recipe.
        config: of the model that it begins with; "apical" in it says that it has sparse layers.

    Raises:
        RecipeError: `sparsity` does not fit to the model, its growth or its moments.
    """
    if stage.sparsity is not None and stage.model.optimizer == "keep":
        message = "is keep, but `sparsity` makes parameters that have no moments; write reset"
        raise RecipeError(("model", "optimizer"), message)
    if stage.sparsity == DENSE:
        if "apical" not in config:
            message = "is dense, but the model has no sparse layers before; remove it"
            raise RecipeError(("sparsity",), message)
        return {key: value for key, value in config.items() if key != "apical"}
    if stage.model.grow is not None and "apical" in config:
        message = "the model has sparse layers, which cannot grow; add `sparsity: dense`"
        raise RecipeError(("model", "grow"), message)
    return config
