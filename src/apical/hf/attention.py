"""Packed attention inside transformers models, through AttentionInterface and one pre-hook."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..kernels.varlen_attention import varlen_attention
from .layout import Layout, layout_of
from .support import body_of

# must not contain "flash": transformers would look for a kernel of that name on the model hub
NAME = "apical"

# tensors that reach every layer and do not change what attention computes
_HARMLESS = frozenset(
    {"cu_seq_lens_k", "cu_seq_lens_q", "num_items_in_batch", "position_ids", "seq_idx"}
    | {"shift_labels", "cache_position", "token_type_ids", "input_ids"}
)
_UNSUPPORTED = frozenset({"sliding_window", "softcap", "s_aux", "position_bias", "cache"})


class PackedAttention:
    """The attention of one model on `varlen_attention`, until `remove` is called.

    The hook is a bound method and holds no module, so that copies and pickles of the model keep
    working hooks and the model is freed without waiting for the garbage collector.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.previous = str(model.config._attn_implementation)
        _own_config(model)
        model.set_attn_implementation(NAME)
        body = body_of(model)
        self.names = tuple(inspect.signature(body.forward).parameters)
        self.handle = body.register_forward_pre_hook(self.add_layout, with_kwargs=True)

    def remove(self, model: PreTrainedModel) -> None:
        """Give the model its former attention back."""
        self.handle.remove()
        if model.config._attn_implementation == NAME:
            model.set_attn_implementation(self.previous)

    def add_layout(
        self, body: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: hand the documents of this batch to every layer."""
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        if body.config._attn_implementation != NAME or not _has_tokens(arguments):
            return None
        for name in ("output_attentions", "encoder_hidden_states"):
            # flags and tensors alike: only an absent or a false one is fine
            value = arguments.get(name)
            if value is not None and value is not False:
                raise NotImplementedError(
                    f"{name} is not supported by apical's attention;"
                    " call use_kernels(model, attention=False)"
                )
        return args, kwargs | {"apical_layout": layout_of(arguments)}


def attend(
    module: nn.Module,
    query: Tensor,  # (B, H, S, D)
    key: Tensor,  # (B, K, S, D)
    value: Tensor,  # (B, K, S, D)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    apical_layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' AttentionInterface; the result is (B, S, H, D)."""
    layout = _checked(module, apical_layout, attention_mask, dropout, options)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    batch, _, length, _ = query.shape
    query, key, value = _autocast(query, key, value)
    packed = varlen_attention(
        _pack(query, layout.tokens_q, length),
        _pack(key, layout.tokens_k, layout.key_length),
        _pack(value, layout.tokens_k, layout.key_length),
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        causal=bool(causal),
        softmax_scale=scaling,
    )  # (T, H, D)
    if layout.tokens_q is not None:
        rows = packed.new_zeros(batch * length, *packed.shape[1:])
        packed = rows.index_copy(0, layout.tokens_q, packed)
    return packed.unflatten(0, (batch, length)), None


def padding_mask(
    *args: Any, attention_mask: Tensor | None = None, use_vmap: bool = False, **options: Any
) -> Tensor | None:
    """Mask function of transformers' AttentionMaskInterface: pass the 2-D mask on as it is."""
    # transformers sets use_vmap exactly when a model overlays its own mask function
    if use_vmap:
        raise NotImplementedError(
            "this model masks attention by a function of its own, which apical's attention does not"
            " know; call use_kernels(model, attention=False)"
        )
    return attention_mask


def _pack(states: Tensor, tokens: Tensor | None, length: int) -> Tensor:
    """Turn (B, H, S, D) into (T, H, D) without the padding."""
    flat = states[:, :, :length].transpose(1, 2).flatten(0, 1)
    return flat if tokens is None else flat.index_select(0, tokens)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as torch's own attention does under `torch.autocast`; outside of it, change nothing."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _checked(
    module: nn.Module,
    layout: Layout | None,
    attention_mask: Tensor | None,
    dropout: float,
    options: dict[str, Any],
) -> Layout:
    """Return the layout, or raise what this call asks for and the kernel does not have."""
    if layout is None:
        raise NotImplementedError(
            f"{type(module).__name__} was called without the documents of its batch;"
            " call apical.use_kernels(model) and then the whole model, not a layer of it"
        )
    unknown = [name for name, value in options.items() if _changes_attention(name, value)]
    if dropout > 0.0:
        unknown.append(f"dropout={dropout}")
    if attention_mask is not None and attention_mask.ndim != 2:
        unknown.append(f"a {attention_mask.ndim}-D attention_mask")
    if unknown:
        raise NotImplementedError(
            f"{type(module).__name__} asks for {', '.join(unknown)}, which apical's attention does"
            " not have yet; call use_kernels(model, attention=False)"
        )
    return layout


def _changes_attention(name: str, value: object) -> bool:
    if name in _UNSUPPORTED:
        return value is not None
    return isinstance(value, Tensor) and name not in _HARMLESS


def _has_tokens(arguments: dict[str, Any]) -> bool:
    # without either, the model itself raises the error that users know
    return arguments.get("input_ids") is not None or arguments.get("inputs_embeds") is not None


def _own_config(model: PreTrainedModel) -> None:
    """Give this instance a configuration of its own: the choice of attention lives there.

    Two models built from one configuration object would otherwise be switched together.
    """
    shared = model.config
    own = copy.deepcopy(shared)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            vars(module)["config"] = own


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, padding_mask)
