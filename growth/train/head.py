"""A model up to its head: what an objective needs instead of the logits."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from apical.hf.loss_logits import PendingLogits


class HeadInputs(NamedTuple):
    """What a head multiplies, and what its model does to the product."""

    hidden: Tensor  # (T, H)
    weight: Tensor  # (V, H)
    # linear_bias, softcap and logit_scale, as `linear_cross_entropy` takes them
    options: dict[str, Any]


class _Hooks:
    """Let a head multiply nothing and return logits that remember how they would be computed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.name = type(model).__name__
        self.hidden: Tensor | None = None

    def skip(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.hidden = args[0]
        return (args[0][..., :0, :], *args[1:])

    def answer(self, head: nn.Linear, args: tuple[Tensor, ...], out: Tensor) -> PendingLogits:
        assert self.hidden is not None
        owner: Any = self
        return PendingLogits(owner, head, self.hidden, head.weight.shape[0])


def run_to_head(model: PreTrainedModel, inputs: Mapping[str, Any]) -> HeadInputs:
    """Run a causal language model without its head.

    Args:
        model: one whose loss `apical.use_kernels` can compute.
        inputs: of its forward, on its device; labels are left out.

    Raises:
        NotImplementedError: the model changes its logits by more than a bias, a scale and a cap.
    """
    head: Any = model.get_output_embeddings()
    hooks = _Hooks(model)
    handles = [
        head.register_forward_pre_hook(hooks.skip),
        head.register_forward_hook(hooks.answer),
    ]
    try:
        kept = {name: value for name, value in inputs.items() if name != "labels"}
        logits: PendingLogits = model(**kept).logits
    finally:
        for handle in handles:
            handle.remove()
    bias = head.bias if logits.bias is None else logits.bias
    options = {"linear_bias": bias, "softcap": logits.softcap, "logit_scale": logits.scale}
    return HeadInputs(logits.hidden.flatten(0, -2), head.weight, options)
