"""The definition, in plain PyTorch: any device, float32 and above, differentiable twice."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ._autograd import Operands
from ._rules import Rules


def forward(operands: Operands, token_weight: Tensor, rules: Rules) -> tuple[Tensor, ...]:
    """Return token_weight x loss, nll, lse, entropy, correct (T,), 0 where token_weight is 0."""
    # these rows alone: 0 * NaN of an ignored row would reach the gradient of linear_weight
    rows = token_weight.nonzero().squeeze(1)  # (N,)
    z = logits(operands, rows, rules)  # (N, V)
    ids, id_weight = operands.ids[rows], operands.id_weight[rows].to(z.dtype)
    lse = z.logsumexp(1)
    nll = F.cross_entropy(z, ids[:, 0], reduction="none")
    loss = id_weight[:, 0] * nll + rules.z_loss * lse.square()
    loss = loss + (id_weight[:, 1:] * (lse[:, None] - z.gather(1, ids[:, 1:]))).sum(1)
    if rules.smoothing:
        above = lse[:, None] - z
        weight = operands.class_weight
        above = above if weight is None else above * weight.to(z.dtype)
        loss = loss + rules.smoothing / z.shape[1] * above.sum(1)
    entropy = torch.special.entr(z.detach().softmax(1)).sum(1)
    correct = (z.gather(1, ids[:, :1]).squeeze(1) >= z.amax(1)).to(z.dtype)
    found = (loss * token_weight[rows].to(z.dtype), nll, lse, entropy, correct)
    zeros = z.new_zeros(token_weight.shape)
    return tuple(zeros.index_put((rows,), value) for value in found)


def logits(operands: Operands, rows: Tensor, rules: Rules) -> Tensor:
    """Return the logits (N, V) of these rows, scaled and capped."""
    x, W, bias = operands.input, operands.linear_weight, operands.linear_bias
    dtype = torch.promote_types(torch.promote_types(x.dtype, W.dtype), torch.float32)
    s = F.linear(x[rows].to(dtype), W.to(dtype), None if bias is None else bias.to(dtype))
    s = rules.logit_scale * s
    return rules.softcap * (s / rules.softcap).tanh() if rules.softcap else s
