"""The vocabulary in slices, one a rank: what the ranks exchange, and when.

Once per call: the sizes of the slices and, with class weights, those of the labels. Per chunk of
rows: one all-gather of each row's partial sums. After the last chunk: one all-reduce of dX.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._common.labelled_rows import check_labels
from . import _chunked as chunked
from . import _passes as passes
from ._passes import Labels, Upstream
from ._rules import Rules


class Slices:
    """The ops' two functions where linear_weight, bias and class_weight are slices.

    Raises:
        ValueError: a rank has no row of linear_weight.
    """

    def __init__(self, group: dist.ProcessGroup, linear_weight: Tensor) -> None:
        own = torch.tensor([len(linear_weight)], device=linear_weight.device)
        sizes = _gathered(own, group).flatten().tolist()
        if 0 in sizes:
            raise ValueError(
                f"linear_weight has no rows on rank {sizes.index(0)} of process_group; "
                "use a group of the ranks that have some"
            )
        self.group, self.total, self.largest = group, sum(sizes), max(sizes)
        self.start = sum(sizes[: dist.get_rank(group)])

    def at_ids(self, weight: Tensor, ids: Tensor) -> Tensor:
        """Return the class weights of the ids, of which this rank has a slice."""
        local = ids - self.start
        here = (local >= 0) & (local < len(weight))
        found = torch.where(here, weight[local.clamp(0, len(weight) - 1)], 0.0)
        dist.all_reduce(found, group=self.group)
        return found

    def forward(
        self,
        input: Tensor,  # noqa: A002
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        ids: Tensor,
        id_weight: Tensor,
        class_weight: Tensor | None,
        token_weight: Tensor,
        *numbers: Any,
    ) -> tuple[Tensor, ...]:
        """Return what the op returns: grad_input complete, the other gradients this slice's."""
        check_labels(ids, token_weight != 0, self.total)
        labels, values = Labels(ids, id_weight, class_weight), chunked.no_values(token_weight)
        upstream, valid = Upstream(token_weight), token_weight != 0
        operands = (input, linear_weight, linear_bias)
        grads = self._sweep(operands, labels, upstream, valid, numbers, values)
        return *values, *grads

    def backward(
        self,
        grad_loss: Tensor,
        grad_nll: Tensor | None,
        grad_lse: Tensor | None,
        input: Tensor,  # noqa: A002
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        ids: Tensor,
        id_weight: Tensor,
        class_weight: Tensor | None,
        lse: Tensor,
        valid: Tensor,
        *numbers: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients for upstream gradients of every token, the same on all ranks."""
        labels, values = Labels(ids, id_weight, class_weight), chunked.no_values(lse)
        upstream = Upstream(grad_loss, grad_nll, grad_lse)
        operands = (input, linear_weight, linear_bias)
        return self._sweep(operands, labels, upstream, valid, numbers, values)

    def _sweep(
        self,
        operands: tuple[Tensor, Tensor, Tensor | None],
        labels: Labels,
        upstream: Upstream,
        valid: Tensor,
        numbers: tuple[Any, ...],
        values: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        (x, W, bias), wanted = operands, chunked.Wanted(*numbers[4:])
        # what each entry of the whole vocabulary gets, for a pass that sees a slice
        rules = Rules(numbers[0] * len(W) / self.total, *numbers[1:4])
        bias = None if bias is None else bias.float()

        def softmax(rows: Tensor, logits: Tensor, half: Tensor | None) -> None:
            here = Labels(labels.ids[rows] - self.start, labels.id_weight[rows], labels[2])
            grads = chunked.at_rows(upstream, rows) if any(wanted) else None
            chunked.keep(values, rows, self._pass_(logits, bias, here, grads, rules))
            if half is not None:
                half.copy_(logits)

        # every rank cuts the same chunks, or they would wait for each other for ever
        with torch.autocast(x.device.type, enabled=False):
            rows = valid.nonzero().squeeze(1)
            target = labels.ids[:, 0] - self.start
            grads = chunked.sweep(x, W, target, rows, wanted, softmax, vocabulary=self.largest)
        if wanted.input:
            dist.all_reduce(grads[0], group=self.group)
        return grads

    def _pass_(
        self,
        logits: Tensor,
        bias: Tensor | None,
        labels: Labels,
        upstream: Upstream | None,
        rules: Rules,
    ) -> passes.Values:
        slope = passes.scores_(logits, bias, rules)
        parts = passes.partial_(logits, labels, rules)
        whole = passes.merge(_gathered(parts, self.group))
        if upstream is not None:
            passes.differentiate_(logits, slope, parts, whole, labels, upstream, rules)
        return whole.values(labels, rules)


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the ranks' tensors in rank order, (N, ...)."""
    out = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    dist.all_gather(list(out.unbind(0)), tensor, group=group)
    return out
