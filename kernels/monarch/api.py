"""The public function: checks its arguments, casts under autocast, chooses the implementation."""

import torch
from torch import Tensor

from . import _checks as checks
from ._autograd import product


def monarch_matmul(
    input: Tensor,  # noqa: A002 - torch's own name
    first: Tensor,
    second: Tensor,
    *,
    bias: Tensor | None = None,
    impl: str = "fused",
) -> Tensor:
    """Return ``input @ M.T + bias`` for a Monarch matrix M (n, m), which is never made.

    Shapes: input (..., m), m = r s; first (r, j k, s), its rows in the order (j, k), k fastest;
    second (k, p, r j), its columns in the order (r, j); bias (n,), n = p k; result (..., n).
    In words: inputs are r runs of s, outputs are k combs of p (every k-th one), and what leads from
    a run to a comb is a (p, s) matrix of rank j, whose factors are a part of each:

        M[P k + K, R s + S] = sum over J of second[K, P, R j + J] first[R, J k + K, S]

    A rank j of min(p, s) or more saves nothing. Costs 2 T r k j (s + p) operations.
    Precision: sums in float32; half precision rounds what is between the two factors, on the CPU
    only to keep it for backward. Under autocast the operands are cast as `linear`'s. Deterministic.

    Args:
        input: activations; any number of leading axes, also none, also of size 0.
        impl: "fused" (one operation each way, differentiable once) or "reference" (plain PyTorch,
            any precision, differentiable as often as you like).

    Raises:
        ValueError: shapes, dtypes or devices disagree, an axis of a factor is empty, an unknown
            impl.
        NotImplementedError: a tensor is sharded.

    Source: Dao et al. 2022 (Monarch, arXiv 2204.00595); layout of the factors as in its code.
    """
    operands = _autocast(input, first, second, bias)
    checks.operands(*operands, impl)
    if impl == "reference":
        from . import _reference as reference

        return reference.forward(*operands)
    input, first, second, bias = operands  # noqa: A001
    output = product(input.reshape(-1, input.shape[-1]), first, second, bias)
    return output.view(*input.shape[:-1], output.shape[1])


def _autocast(
    input: Tensor,  # noqa: A002
    first: Tensor,
    second: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    device = input.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return input, first, second, bias
    # what autocast does to linear: float64 stays
    dtype = torch.get_autocast_dtype(device)
    operands = (input, first, second)
    input, first, second = (t if t.dtype == torch.float64 else t.to(dtype) for t in operands)  # noqa: A001
    return input, first, second, None if bias is None else bias.to(input.dtype)
