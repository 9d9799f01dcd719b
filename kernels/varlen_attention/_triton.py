"""The Triton kernels of NVIDIA GPUs: which calls they take, and both passes."""

import torch
from torch import Tensor

from .._common.triton_device import runs_triton
from ._layout import PackedLayout
from ._rules import Rules

# registers and shared memory hold blocks of whole heads
LARGEST_HEAD = 256


def takes(q: Tensor, v: Tensor, rules: Rules) -> bool:
    """Return whether the kernels can compute attention of q; float64 they cannot.

    Shapes: q (T, H, D), v (T_k, K, E).
    """
    known = q.dtype in (torch.bfloat16, torch.float16, torch.float32)
    fits = 0 < q.shape[-1] <= LARGEST_HEAD and v.shape[-1] <= LARGEST_HEAD
    return known and fits and runs_triton(q.device)


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Return the result (T, H, E) in q's dtype and lse (T, H) float32."""
    from . import _triton_forward

    return _triton_forward.forward(q, k, v, layout.to(q.device), rules)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: PackedLayout,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v, and of the gain if there is one."""
    from . import _triton_backward

    here = layout.to(q.device)
    return _triton_backward.backward(grad_out, grad_lse, q, k, v, out, lse, here, rules)
