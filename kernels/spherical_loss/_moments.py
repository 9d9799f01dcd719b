"""First and second moments of the weights' rows instead of logits, and the gradients from them."""

import torch
from torch import Tensor

# rows of the weights, or tokens, that are raised to float64 at a time
_ROWS = 1024
# part of |h|^2 trace(C) below which h C h, a sum that may cancel, is rounding in float64
_ROUNDING = 1e-13


def forward(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor,
    valid: Tensor,
    input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and margin as (3, T) float64, the rows' mean, and 2 C h, if wanted."""
    T, H = input.shape
    statistics = input.new_zeros(3, T, dtype=torch.float64)
    pull = input.new_zeros((T, H) if input_grad else 0, dtype=torch.float32)
    centre, covariance = _moments(linear_weight)
    smallest = _ROUNDING * covariance.trace()
    for rows in valid.nonzero().squeeze(1).split(_ROWS):
        h = input[rows].double()  # (C, H)
        pulled = h @ covariance
        variance = (pulled * h).sum(1)
        variance = torch.where(variance > smallest * h.square().sum(1), variance, 0.0)
        own = linear_weight[target[rows]].double() - centre
        statistics[:, rows] = torch.stack((h @ centre, variance, (h * own).sum(1)))
        if input_grad:
            pull[rows] = pulled.mul_(2).float()
    return statistics, centre, pull


def _moments(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (H,) and the covariance (H, H) of the rows, in float64.

    About the mean: of the sum of squares less the squared sum, rows that have much in common would
    leave rounding. Equal rows of at most 24 bits leave exactly 0.
    """
    V, H = weight.shape
    centre = weight.sum(0, dtype=torch.float64) / V
    covariance = weight.new_zeros(H, H, dtype=torch.float64)
    for part in weight.split(_ROWS):
        apart = part.double() - centre
        covariance.addmm_(apart.t(), apart, alpha=1 / V)
    return centre, covariance


def backward(
    grads: Tensor,
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor,
    valid: Tensor,
    centre: Tensor,
    pull: Tensor,
    input_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return the float32 gradients of input and linear_weight, of shape (0,) if not wanted.

    Args:
        grads: gradients of mean, variance and margin, (3, T) float64; read where valid.
    """
    (T, H), V = input.shape, linear_weight.shape[0]
    grad_input = input.new_zeros((T, H) if input_grad else 0, dtype=torch.float32)
    second = input.new_zeros(H, H, dtype=torch.float64)
    first = input.new_zeros(H, dtype=torch.float64)
    own_rows, own_labels = [], []
    for rows in valid.nonzero().squeeze(1).split(_ROWS):
        of_mean, of_variance, of_margin = grads[:, rows, None]  # (C, 1)
        labels = target[rows]
        if input_grad:
            own = linear_weight[labels].double() - centre
            grad_input[rows] = (
                of_variance * pull[rows] + of_mean * centre + of_margin * own
            ).float()
        if weight_grad:
            h = input[rows].double()
            second.addmm_((of_variance * h).t(), h, alpha=2 / V)
            first += ((of_mean - of_margin) * h).sum(0) / V
            own_rows.append((of_margin * h).float())
            own_labels.append(labels)
    if not weight_grad:
        return grad_input, grad_input.new_zeros(0)
    grad_weight = _dense(linear_weight, centre, second, first)
    if own_rows:
        # index_put sorts where it must: the order of additions is fixed on every device
        grad_weight.index_put_((torch.cat(own_labels),), torch.cat(own_rows), accumulate=True)
    return grad_input, grad_weight


def _dense(weight: Tensor, centre: Tensor, second: Tensor, first: Tensor) -> Tensor:
    """Return (weight - centre) second + first, what every row of the weights receives."""
    grad = weight.new_empty(weight.shape, dtype=torch.float32)
    product, row = second.float(), first.float()
    for part, out in zip(weight.split(_ROWS), grad.split(_ROWS), strict=True):
        torch.addmm(row, (part.double() - centre).float(), product, out=out)
    return grad
