"""The fused loss inside transformers models: hooks on the model and on its head."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kernels.linear_cross_entropy import linear_cross_entropy
from .loss_logits import PendingLogits
from .support import heads_of

# of a head, during a step
_STEP = "_apical_step"


class Answer(NamedTuple):
    """What a head returns when it is asked for the loss: no hook takes it for logits."""

    loss: Tensor


class _Step:
    """What one step knows. It lies on the heads, of which every replica has its own."""

    hidden: Tensor | None = None
    question: tuple[PendingLogits, Tensor, dict[str, Any]] | None = None
    called = False
    computed = False

    def __init__(self, owner: "FusedLoss") -> None:
        # a copied head has hooks of a copied owner
        self.owner = owner


class FusedLoss:
    """One model's training loss on `linear_cross_entropy`, until `remove` is called.

    In training with labels the head multiplies nothing and returns `PendingLogits`, which go
    through the model's own code into its own loss. There torch hands them to `compute`, and that
    calls the head once more: whatever gathers weights around a head's call (FSDP, ZeRO) does so,
    and finds the gradients where it looks for them.
    Hooks are bound methods and hold no module: see `PackedAttention`.
    """

    def __init__(self, model: PreTrainedModel, *, z_loss: float) -> None:
        self.z_loss = z_loss
        self.name = type(model).__name__
        self.names = tuple(inspect.signature(model.forward).parameters)
        self.handles = [
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.register_forward_hook(self.end, always_call=True),
        ]
        for head in heads_of(model):
            self.handles.append(head.register_forward_pre_hook(self.skip_head))
            # before the hook that shards the weight again
            self.handles.append(head.register_forward_hook(self.answer, prepend=True))

    def remove(self, model: PreTrainedModel) -> None:
        """Give the model its former loss back."""
        for handle in self.handles:
            handle.remove()

    def begin(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the model: fuse where a loss is asked for in training."""
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        if not model.training or arguments.get("labels") is None:
            return None
        step = _Step(self)
        for head in heads_of(model):
            vars(head)[_STEP] = step
        if kwargs.get("num_items_in_batch") is None:
            return None
        # a batch without labels has loss 0, not 0 / 0
        count = torch.as_tensor(kwargs["num_items_in_batch"]).clamp(min=1)
        return args, kwargs | {"num_items_in_batch": count}

    def skip_head(self, head: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Forward pre-hook of the head: let it multiply no rows."""
        step: _Step | None = vars(head).get(_STEP)
        if step is None or step.owner is not self:
            return None
        step.hidden = args[0]
        return (args[0][..., :0, :], *args[1:])

    def answer(
        self, head: nn.Linear, args: tuple[Tensor, ...], out: Tensor
    ) -> PendingLogits | Answer | None:
        """Forward hook of the head: return logits to be, or the loss where it is asked for."""
        step: _Step | None = vars(head).get(_STEP)
        if step is None or step.owner is not self or step.hidden is None:
            return None
        hidden, step.hidden = step.hidden, None
        step.called = True
        if step.question is None:
            return PendingLogits(self, head, hidden, head.weight.shape[0])
        return Answer(self._loss(head, hidden, *step.question))

    def compute(self, logits: PendingLogits, target: Tensor, options: dict[str, Any]) -> Tensor:
        """Return the cross-entropy of logits to be, with torch's options."""
        step: _Step | None = vars(logits.head).get(_STEP)
        if step is None:
            logits.refuse("a loss outside of the model's own call")
        step.question = (logits, target, options)
        try:
            out = logits.head(logits.hidden)
        finally:
            step.question = None
        if not isinstance(out, Answer):
            logits.refuse(f"a hook that turns the head's output into a {type(out).__name__}")
        step.computed = True
        return out.loss

    def _loss(
        self,
        head: nn.Linear,
        hidden: Tensor,
        logits: PendingLogits,
        target: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        bias = head.bias if logits.bias is None else logits.bias
        if head.bias is not None and logits.bias is not None:
            bias = head.bias + logits.bias
        if type(head.weight) not in (Tensor, nn.Parameter):
            logits.refuse(f"a head whose weight is a {type(head.weight).__name__}")
        hidden, weight, bias = _as_in_a_linear(hidden, head.weight, bias)
        return linear_cross_entropy(
            hidden,
            weight,
            target,
            linear_bias=bias,
            softcap=logits.softcap,
            logit_scale=logits.scale,
            z_loss=self.z_loss,
            # the fused implementation computes in float32
            impl="reference" if hidden.dtype == torch.float64 else "fused",
            **options,
        ).loss

    def end(self, model: PreTrainedModel, args: tuple[Any, ...], out: Any) -> Any:
        """Forward hook of the model: return no logits where there are none."""
        # what stays there would keep the graph of this step alive
        steps: list[_Step | None] = [vars(head).pop(_STEP, None) for head in heads_of(model)]
        step = steps[0]
        if step is None or out is None:
            return None
        if not step.computed:
            reason = (
                "computes its loss by something other than torch's cross_entropy of the logits"
                if step.called
                else "did not call its head: if that is a new one, call use_kernels(model) again"
            )
            raise NotImplementedError(
                f"{self.name} {reason}; else call use_kernels(model, loss=False)"
            )
        if isinstance(out, tuple):
            return tuple(None if isinstance(x, PendingLogits) else x for x in out)
        kept = {name: x for name, x in out.items() if not isinstance(x, PendingLogits)}
        return type(out)(**kept)


def _as_in_a_linear(*tensors: Tensor | None) -> list[Any]:
    """Cast as autocast does for the product of a linear layer."""
    device = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    half = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype == torch.float64 else x.to(half) for x in tensors]
