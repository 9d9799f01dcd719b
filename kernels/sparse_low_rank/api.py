"""The public function: checks its arguments, casts under autocast, chooses the implementation."""

import torch
from torch import Tensor

from . import _checks as checks
from ._autograd import Rules, product
from .support import Support


def sparse_low_rank(
    input: Tensor,  # noqa: A002 - torch's own name
    a: Tensor,
    b: Tensor,
    values: Tensor,
    support: Support,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    recompute_hidden: bool = False,
    impl: str = "fused",
) -> Tensor:
    """Return ``input @ (scale * b @ a + S).T + bias``, S the sparse matrix of the values.

    Shapes: input (..., m); a (R, m); b (n, R); values (S,), in the order of ``support.flat()``;
    bias (n,); result (..., n). Here m is support.in_features and n support.out_features.
    Precision: sums in float32; half precision rounds ``input @ a.T``, and on the CPU the low-rank
    part before the sparse one is added. On a GPU unstructured supports round the weight instead.
    Under autocast the operands are cast as `linear`'s. Deterministic.

    Args:
        input: activations; any number of leading axes, also none, also of size 0.
        support: which entries of the weight the values are.
        scale: factor of the low-rank part, in the papers alpha / R.
        recompute_hidden: keep no ``input @ a.T`` for the backward pass, which computes it again:
            T R numbers less per layer for a twelfth more work.
        impl: "fused" (one operation each way, differentiable once) or "reference" (plain PyTorch
            on the whole weight, any precision, differentiable as often as you like).

    Raises:
        ValueError: shapes, dtypes or devices disagree, a rank of 0, values of another number than
            the support stores, an unknown impl.
        NotImplementedError: a tensor is sharded.

    Source: SLTrain, Han et al. 2024, arXiv:2406.02214.
    """
    operands = _autocast(input, a, b, values, bias)
    checks.operands(*operands, support, impl)
    checks.scale(scale)
    if impl == "reference":
        from . import _reference as reference

        return reference.forward(*operands, support, scale)
    input, *others = operands  # noqa: A001
    rows = input.reshape(-1, support.in_features)  # (T, m)
    rules = Rules(_layout(support), float(scale), bool(recompute_hidden))
    output = product((rows, *others), support.index(input.device), rules)
    return output.view(*input.shape[:-1], support.out_features)


def _layout(support: Support) -> list[int]:
    kind = int(support.kind == "grouped")
    return [kind, support.out_features, support.in_features, *support.block]


def _autocast(
    input: Tensor,  # noqa: A002
    a: Tensor,
    b: Tensor,
    values: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    device = input.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return input, a, b, values, bias
    # what autocast does to linear: float64 stays
    dtype = torch.get_autocast_dtype(device)
    operands = (input, a, b, values)
    input, a, b, values = (t if t.dtype == torch.float64 else t.to(dtype) for t in operands)  # noqa: A001
    return input, a, b, values, None if bias is None else bias.to(dtype)
