"""The loss and its gradients in one pass over chunks of rows, on the GPU, without a host sync.

A chunk's exponentials are centred at the logit of each row's target, which is known before the
product: so they are stored, in half precision, by the product itself, and both gradients are
products with them (kernels/linear_cross_entropy/README.md).
"""

import torch
from torch import Tensor

from . import _triton_filter as tiles
from . import _triton_launch as run
from . import _triton_launch_rows as by_row
from ._rules import Rules
from ._triton_launch import Case, case_of, padded
from ._triton_tiles import ROWS

# bytes of exponentials at a time, and the fewest rows that this may mean
_CHUNK_BYTES = 2**30
_CHUNK_ROWS = 2048
# exponentials are of z - target - 30: from 57 below the target's logit to 90 above it they and
# their sums are normal numbers of 8 bits of exponent; rows beyond are done again
_ABOVE_TARGET = 30.0


def forward(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    ids: Tensor,
    id_weight: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor,
    rules: Rules,
    wanted: tuple[bool, bool, bool],
    *,
    filtered: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, nll, lse, entropy, correct (T,), and the gradients of input, weight, bias."""
    T, (V, H) = len(input), linear_weight.shape
    loss, nll, lse, entropy, correct = input.new_zeros(5, T, dtype=torch.float32)
    results = loss, nll, lse, entropy, correct
    # the first chunk overwrites those of weight and bias
    new = input.new_empty if T else input.new_zeros
    grad_input = input.new_zeros((T, H) if wanted[0] else 0, dtype=torch.float32)
    grad_weight = new((V, H) if wanted[1] else 0, dtype=torch.float32)
    grad_bias = new(V if wanted[2] else 0, dtype=torch.float32)
    if not T:
        return *results, grad_input, grad_weight, grad_bias
    valid = token_weight != 0
    rest = (input, linear_weight, linear_bias, ids, id_weight, class_weight)
    case = case_of(*rest, token_weight, valid, rules)
    # a capped logit's slope is not in what a chunk stores, and smoothing needs it at every class
    later = any(wanted) and rules.softcap > 0 and rules.smoothing > 0
    pass_ = _Pass(case, results, (False, False, False) if later else wanted, filtered)
    for rows in pass_.chunks():
        pass_.chunk(rows, (grad_input, grad_weight, grad_bias))
    if later:
        from . import _triton_backward

        ones = (token_weight, None, None)
        grads = _triton_backward.backward(ones, *rest, lse, valid, rules, wanted)
        return *results, *grads
    if rules.smoothing:
        _subtract_dense(case, grad_weight, grad_bias, wanted)
    return *results, grad_input, grad_weight, grad_bias


class _Pass:
    """The buffers of one call."""

    def __init__(
        self,
        case: Case,
        results: tuple[Tensor, ...],
        wanted: tuple[bool, bool, bool],
        filtered: bool,
    ) -> None:
        self.case, self.results, self.wanted, self.filtered = case, results, wanted, filtered
        x, V = case.x, len(case.linear_weight)
        C = self.chunks()[0].stop
        self.e = self.scaled = None
        self.values: tuple[Tensor, ...] | tuple[None, ...] = (None,) * 4
        if any(wanted):
            self.e = x.new_empty(C, padded(V, 8), dtype=case.stored)[:, :V]
            self.values = tuple(x.new_empty(len(x), dtype=torch.float32) for _ in range(4))
        if wanted[1]:
            self.scaled = x.new_empty(C, x.shape[1], dtype=case.stored)
        self.center = case.logits[:, 0] + _ABOVE_TARGET
        self.again = x.new_zeros(len(x), dtype=torch.int32)
        kinds = 4 if case.rules.smoothing else 3
        self.sums = x.new_empty(kinds, run.pieces(case), C, dtype=torch.float32)
        self.class_sum = self.dense = None
        if case.rules.smoothing:
            self.class_sum = _class_weights(case).sum()
            if wanted[0]:
                self.dense = _dense(case)

    def chunks(self) -> list[slice]:
        """Return the rows of each chunk, whole tiles of almost equal numbers."""
        P, V = len(self.case.x), len(self.case.linear_weight)
        most = _CHUNK_BYTES // (V * self.case.stored.itemsize) // ROWS * ROWS
        count = -(-P // max(most, _CHUNK_ROWS))
        size = padded(-(-P // count), ROWS)
        return [slice(i, min(i + size, P)) for i in range(0, P, size)]

    def chunk(self, rows: slice, grads: tuple[Tensor, Tensor, Tensor]) -> None:
        """Do a chunk: exponentials, sums, labels, gradients."""
        case, (factor, push, rest, own) = self.case, self.values
        C = rows.stop - rows.start
        e = None if self.e is None else self.e[:C]
        self._sums(rows, e)
        if e is None or push is None or factor is None or rest is None or own is None:
            return
        scaled = None if self.scaled is None else self.scaled[:C]
        lse, active = self.results[2], None
        if self.filtered:
            active = tiles.active_tiles(case, rows, lse, self.center, self.sums)
        mode = {"mode": (factor, rest, own), "active": active}
        by_row.mend_labels(case, rows, e, lse, push, scaled=scaled, **mode)
        of_rows, of_columns = (None, None) if active is None else tiles.kept(active)
        add, more = rows.start > 0, {"factor": factor, "dense": self.dense}
        if self.wanted[0]:
            run.input_gradient(case, rows, e, grads[0], kept=of_rows, **more)
        if scaled is not None:
            run.weight_gradient(case, rows, e, scaled, grads[1], kept=of_columns, add=add)
        if self.wanted[2]:
            by_row.bias_gradient(case, rows, e, grads[2], factor=factor, add=add)

    def _sums(self, rows: slice, e: Tensor | None) -> None:
        case, more = self.case, (self.values, self.class_sum)
        run.exponentials_of(case, rows, e, self.center, self.sums)
        by_row.finish(case, rows, self.results, self.sums, self.center, *more, self.again)
        # the tiles with rows out of range, if any, once more: the device knows how many
        tile = run.exponential_choices(case)[0]
        marked = self.again[rows].view(-1, tile.rows).amax(1)
        again = torch.argsort(marked, descending=True, stable=True), marked.sum().reshape(1)
        run.exponentials_of(case, rows, e, self.center, self.sums, again=again)
        by_row.finish(case, rows, self.results, self.sums, self.center, *more, None)


def _class_weights(case: Case) -> Tensor:
    if case.class_weight is not None:
        return case.class_weight
    return case.x.new_ones(len(case.linear_weight), dtype=torch.float32)


def _dense(case: Case) -> Tensor:
    """Return sum_j u_j W_j (H,), the constant part of a smoothed label's gradient."""
    total = case.x.new_zeros(case.x.shape[1], dtype=torch.float32)
    for w, u in zip(case.linear_weight.split(4096), _class_weights(case).split(4096), strict=True):
        total += (u[:, None] * w.float()).sum(0)
    return total * case.share


def _subtract_dense(
    case: Case, grad_weight: Tensor, grad_bias: Tensor, wanted: tuple[bool, bool, bool]
) -> None:
    u = _class_weights(case) * (case.share * case.rules.logit_scale)
    if wanted[1]:
        total = case.x.new_zeros(case.x.shape[1], dtype=torch.float32)
        for x, token in zip(case.x.split(4096), case.token.split(4096), strict=True):
            total += (token[:, None] * x.float()).sum(0)
        grad_weight.addr_(u, total, alpha=-1)
    if wanted[2]:
        grad_bias.sub_(u * case.token.sum())
