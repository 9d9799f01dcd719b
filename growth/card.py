"""The files that say how a checkpoint was grown."""

from .checkpoint_output import as_json
from .plan import GrowthPlan


def plan_texts(plan: GrowthPlan, name: str) -> dict[str, str]:
    """Return the files that say how a checkpoint was grown out of the one with this name."""
    return {
        "apical_growth.json": as_json(plan.to_dict()),
        "plan.yaml": plan.to_yaml(),
        "README.md": _card(name, plan),
    }


def _card(name: str, plan: GrowthPlan) -> str:
    kept = (
        "computes what the source computes"
        if plan.preserves_function
        else "is to be trained further"
    )
    return (
        "---\nlibrary_name: transformers\ntags: [apical, model-growth]\n---\n\n"
        f"# {name}, grown by {plan.operator}\n\n"
        f"This checkpoint was grown from `{name}` by apical; it {kept}. "
        "It loads with plain `AutoModel*.from_pretrained`. The whole plan is in "
        f"`apical_growth.json`.\n\n```\n{plan}\n```\n"
    )
