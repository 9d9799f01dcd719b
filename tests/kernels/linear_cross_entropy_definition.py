"""The loss of the ops and its gradients in float64, as the README defines them."""

from typing import NamedTuple

import torch
from torch import Tensor

from apical.kernels.linear_cross_entropy._rules import Rules

PLAIN = Rules(smoothing=0.0, z_loss=0.0, softcap=0.0, logit_scale=1.0)


class Inputs(NamedTuple):
    """What both ops take, labels as (T, K) with a weight for each."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    ids: Tensor
    id_weight: Tensor
    class_weight: Tensor | None
    token_weight: Tensor


def values(inputs: Inputs, rules: Rules) -> tuple[Tensor, ...]:
    """Return loss, nll, lse, entropy and correct of each token, 0 where token_weight is."""
    x, w, bias, ids, shares, classes, token = inputs
    rows = token.nonzero().squeeze(1)
    ids, shares = ids[rows], shares[rows].double()
    s = x[rows].double() @ w.double().t()
    s = rules.logit_scale * (s if bias is None else s + bias.double())
    z = rules.softcap * (s / rules.softcap).tanh() if rules.softcap else s
    lse = z.logsumexp(1)
    u = torch.ones(len(w)) if classes is None else classes
    smooth = rules.smoothing / len(w) * (u.double() * (lse[:, None] - z)).sum(1)
    at = lse[:, None] - z.gather(1, ids)
    # log1p: a loss far below the precision of lse
    others = z.scatter(1, ids[:, :1], -torch.inf) - z.gather(1, ids[:, :1])
    nll = others.logsumexp(1)
    nll = torch.where(nll < 0, nll.exp().log1p(), nll + (-nll).exp().log1p())
    loss = (shares * torch.cat([nll[:, None], at[:, 1:]], 1)).sum(1)
    loss = loss + smooth + rules.z_loss * lse.square()
    entropy = -(z.softmax(1) * z.log_softmax(1)).sum(1)
    correct = (z.gather(1, ids[:, :1]).squeeze(1) >= z.amax(1)).double()
    zeros = torch.zeros(len(token), dtype=torch.float64)
    return tuple(zeros.index_put((rows,), v) for v in (loss, nll, lse, entropy, correct))


def gradients(
    inputs: Inputs, rules: Rules, upstream: tuple[Tensor | None, ...] | None = None
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Return the values and, in float64, the gradients of input, linear_weight and linear_bias.

    Args:
        upstream: gradients of loss, nll and lse; by default token_weight is that of the loss.
    """
    leaves = [
        None if leaf is None else leaf.detach().double().requires_grad_() for leaf in inputs[:3]
    ]
    found = values(inputs._replace(**dict(zip(Inputs._fields[:3], leaves, strict=True))), rules)
    upstream = (inputs.token_weight,) if upstream is None else upstream
    total = sum(
        (g.double() * v).sum() for g, v in zip(upstream, found, strict=False) if g is not None
    )
    present = [leaf for leaf in leaves if leaf is not None]
    assert isinstance(total, Tensor)
    return tuple(v.detach() for v in found), list(torch.autograd.grad(total, present))
