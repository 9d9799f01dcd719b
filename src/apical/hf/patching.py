"""Putting the kernels into a model, giving it back, and saying which of both holds."""

from transformers import PreTrainedModel

from .attention import NAME, PackedAttention
from .loss import FusedLoss
from .padding import packing_refusal
from .support import attention_refusal, attention_traits, body_of, keeps_keywords, loss_refusal

# attributes of a patched instance that hold what undoes the patch
_ATTENTION, _LOSS = "_apical_attention", "_apical_loss"


def use_kernels(
    model: PreTrainedModel, *, attention: bool = True, loss: bool = True, z_loss: float = 0.0
) -> PreTrainedModel:
    """Put the kernels into a transformers model and return the same model.

    Only this instance changes, and only through transformers' own hooks. A part that is False is
    given back as it was. What cannot be replaced stays as it is, and `explain` says why. In
    training with labels the output then holds no logits.

    Args:
        model: any model whose attention goes through transformers' AttentionInterface, or whose
            head is an nn.Linear and whose loss is torch's cross_entropy of its logits.
        attention: attend by `varlen_attention`. Packed documents never see each other, whether they
            come by ``cu_seq_lens_q``, ``seq_idx`` or ``position_ids`` that restart. Padded rows run
            as one packed row through all layers where no cache comes out: in training, unless
            ``use_cache=True`` is passed, and elsewhere with ``use_cache=False``.
        loss: compute the training loss by `linear_cross_entropy`, without the logits. What the
            model does to logits before its cross-entropy (scale, soft cap, bias, choice of rows) is
            done too, or refused by name in the first step.
        z_loss: weight of the squared log-partition in the training loss.

    Raises:
        NotImplementedError: nothing that was asked for can be replaced; the model is then stock.
        ValueError: model is not a transformers model, or z_loss is negative.

    Source: ours.
    """
    _check(model, z_loss)
    for name in (_ATTENTION, _LOSS):
        if name in vars(model):
            vars(model).pop(name).remove(model)
    refusals = [
        attention_refusal(model) if attention else None,
        loss_refusal(model) if loss else None,
    ]
    if any(refusals) and sum(map(bool, refusals)) == attention + loss:
        raise NotImplementedError(
            f"{type(model).__name__}: nothing can be replaced, train it without use_kernels"
            f" ({'; '.join(filter(None, refusals))})"
        )
    if attention and refusals[0] is None:
        vars(model)[_ATTENTION] = PackedAttention(model)
    if loss and refusals[1] is None:
        vars(model)[_LOSS] = FusedLoss(model, z_loss=z_loss)
    return model


def explain(model: PreTrainedModel) -> str:
    """Return a table of what computes a model's attention and loss, and why.

    Raises:
        ValueError: model is not a transformers model.
    """
    _check(model, 0.0)
    rows = [("part", "active", "why"), _attention_row(model), _loss_row(model)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {why}" for a, b, why in rows)


def _attention_row(model: PreTrainedModel) -> tuple[str, str, str]:
    active = str(model.config._attn_implementation)
    family = model.config.model_type
    if _ATTENTION not in vars(model):
        reason = attention_refusal(model) or "not asked for: call apical.use_kernels(model)"
    elif active == NAME:
        reason = "; ".join(_attention_notes(body_of(model)))
    else:
        reason = "chosen by set_attn_implementation after use_kernels"
    return "attention", active, f"{family}: {reason}"


def _attention_notes(body: PreTrainedModel) -> list[str]:
    notes = [f"varlen_attention, no attention across packed documents{_traits(body)}"]
    refusal = packing_refusal(body)
    if refusal is None:
        notes.append("padding is left out of all layers")
    else:
        notes.append(f"padding is left out of attention alone: {refusal}")
    keeper = keeps_keywords(body)
    if keeper is not None:
        notes.append(f"no gradient checkpointing: {keeper} keeps the documents from its attention")
    return notes


def _traits(body: PreTrainedModel) -> str:
    return "".join(f", {trait}" for trait in attention_traits(body))


def _loss_row(model: PreTrainedModel) -> tuple[str, str, str]:
    fused = vars(model).get(_LOSS)
    family = model.config.model_type
    if fused is None:
        reason = loss_refusal(model) or "not asked for: call apical.use_kernels(model)"
        return "loss", "stock", f"{family}: {reason}"
    reason = f"linear_cross_entropy in training, without logits; z_loss={fused.z_loss}"
    return "loss", NAME, f"{family}: {reason}"


def _check(model: PreTrainedModel, z_loss: float) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model is a {type(model).__name__}, expected a transformers PreTrainedModel;"
            " for a wrapped one pass the model inside, before wrapping it"
        )
    if z_loss < 0:
        raise ValueError(f"z_loss is {z_loss}, expected 0 or more")
