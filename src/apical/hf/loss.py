"""The fused loss inside transformers models: the loss_function setter and hooks on the head."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..kernels.linear_cross_entropy import linear_cross_entropy
from .support import head_of


class FusedLoss:
    """One model's training loss on `linear_cross_entropy`, until `remove` is called.

    In training with labels the head is skipped: its hidden states travel to `loss_function` in the
    place of the logits. Hooks are bound methods and hold no module: see `PackedAttention`.
    """

    def __init__(self, model: PreTrainedModel, *, z_loss: float) -> None:
        self.z_loss = z_loss
        self.stock = model.loss_function
        self.had_own = "_loss_function" in vars(model)
        self.names = tuple(inspect.signature(model.forward).parameters)
        self.fusing = False
        self.hidden: Tensor | None = None
        self.head: nn.Linear | None = None
        head = head_of(model)
        self.handles = [
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            head.register_forward_pre_hook(self.skip_head),
            head.register_forward_hook(self.keep_hidden),
            model.register_forward_hook(self.end, always_call=True),
        ]
        model.loss_function = self.loss

    def remove(self, model: PreTrainedModel) -> None:
        """Give the model its former loss back."""
        for handle in self.handles:
            handle.remove()
        if self.had_own:
            model.loss_function = self.stock
        else:
            del model._loss_function

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: fuse where a loss is asked for in training."""
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        self.fusing = model.training and arguments.get("labels") is not None

    def skip_head(self, head: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Forward pre-hook of the head: let it multiply no rows."""
        if not self.fusing:
            return None
        self.hidden, self.head = args[0], head
        return (args[0][..., :0, :], *args[1:])

    def keep_hidden(self, head: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """Forward hook of the head: return the hidden states instead of the logits."""
        return self.hidden if self.fusing else None

    def loss(self, logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
        """Loss function of the model, with the arguments of the stock one."""
        if not self.fusing:
            return self.stock(logits=logits, labels=labels, vocab_size=vocab_size, **options)
        if self.head is None or logits is not self.hidden:
            raise NotImplementedError(
                "the model has a new head, or changes logits between its head and its loss;"
                " call use_kernels(model) again for a new head, else use_kernels(model, loss=False)"
            )
        # looked up only now: a head that is sharded on its own is refused by the kernel
        return self._fused(logits, self.head.weight, labels, **options)

    def _fused(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        if self.stock is ForCausalLMLoss:
            labels = _next_tokens(labels, ignore_index) if shift_labels is None else shift_labels
        return linear_cross_entropy(
            hidden.flatten(0, -2),
            weight,
            labels.to(hidden.device).flatten(),
            ignore_index=ignore_index,
            z_loss=self.z_loss,
            num_items=num_items_in_batch,
            # the fused implementation computes in float32
            impl="reference" if hidden.dtype == torch.float64 else "fused",
        ).loss

    def end(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """Forward hook of the model: return no logits where there are none."""
        # the hidden states would keep the graph of this step alive, the head a cycle
        self.hidden = self.head = None
        fused, self.fusing = self.fusing, False
        if not fused or out is None:
            return None
        if isinstance(out, tuple):
            return (out[0], None, *out[2:])
        return type(out)(**{name: value for name, value in out.items() if name != "logits"})


def _next_tokens(labels: Tensor, ignore_index: int) -> Tensor:
    return pad(labels, (0, 1), value=ignore_index)[..., 1:]
