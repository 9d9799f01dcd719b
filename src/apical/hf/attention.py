"""Packed attention inside transformers models, through AttentionInterface and two hooks."""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..kernels.varlen_attention import varlen_attention
from .layout import Layout, layout_of
from .padding import pack, packing_refusal, unpack
from .support import attention_modules, body_of, keeps_keywords

# must not contain "flash": transformers would look for a kernel of that name on the model hub
NAME = "apical"

# tensors that reach every layer and do not change what attention computes
_HARMLESS = frozenset(
    {"cu_seq_lens_k", "cu_seq_lens_q", "num_items_in_batch", "position_ids", "seq_idx"}
    | {"shift_labels", "cache_position", "token_type_ids", "input_ids"}
)
_UNSUPPORTED = frozenset({"position_bias", "cache"})
# the pieces that transformers makes its masks of; what is none of them is a model's own rule
_KNOWN_MASKS = frozenset(
    {"causal_mask_function", "bidirectional_mask_function", "packed_sequence_mask_function"}
    | {"sliding_window_overlay", "sliding_window_bidirectional_overlay"}
)
# of a layer between its model's hooks, where its family hands no keyword arguments on
_HANDED = "_apical_layout"


class PackedAttention:
    """The attention of one model on `varlen_attention`, until `remove` is called.

    The hooks are bound methods and hold no module, so that copies and pickles of the model keep
    working hooks and the model is freed without waiting for the garbage collector. What belongs to
    one call travels in its arguments, so that replicas and threads do not meet.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.previous = str(model.config._attn_implementation)
        _own_config(model)
        model.set_attn_implementation(NAME)
        body = body_of(model)
        self.names = tuple(inspect.signature(body.forward).parameters)
        self.packs_rows = packing_refusal(body) is None
        self.hands_over = keeps_keywords(body) is not None
        self.handles = [
            body.register_forward_pre_hook(self.begin, with_kwargs=True),
            body.register_forward_hook(self.end, with_kwargs=True, always_call=True),
        ]

    def remove(self, model: PreTrainedModel) -> None:
        """Give the model its former attention back."""
        for handle in self.handles:
            handle.remove()
        if model.config._attn_implementation == NAME:
            model.set_attn_implementation(self.previous)

    def begin(
        self, body: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: hand the documents of this batch to every layer, without padding."""
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        if body.config._attn_implementation != NAME or not _has_tokens(arguments):
            return None
        _check_arguments(body, arguments)
        layout = layout_of(arguments)
        packed = pack(body, self.names, arguments, layout) if self.packs_rows else None
        if packed is not None:
            args, kwargs, layout = (), *packed
        if self.hands_over:
            for module in attention_modules(body):
                vars(module)[_HANDED] = layout
        return args, kwargs | {"apical_layout": layout}

    def end(
        self, body: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Any:
        """Forward hook: give padded rows back where there were some."""
        if self.hands_over:
            for module in attention_modules(body):
                vars(module).pop(_HANDED, None)
        layout = kwargs.get("apical_layout")
        if out is None or layout is None or layout.padding is None:
            return None
        return unpack(body, out, layout.padding)


def attend(
    module: nn.Module,
    query: Tensor,  # (B, H, S, D)
    key: Tensor,  # (B, K, S, D)
    value: Tensor,  # (B, K, S, E)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    apical_layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' AttentionInterface; the result is (B, S, H, E)."""
    handed = vars(module).get(_HANDED) if apical_layout is None else apical_layout
    layout = _checked(module, handed, attention_mask, options)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    keys = layout.keys(key.shape[2])
    query, key, value = _autocast(query, key, value)
    packed = varlen_attention(
        _pack(query, layout.tokens, layout.length),
        _pack(key, keys.tokens, keys.columns),
        _pack(value, keys.tokens, keys.columns),
        *keys.documents,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=bool(causal),
        window_size=_window(module, sliding_window, layout, keys.columns),
        softcap=softcap or 0.0,
        sinks=s_aux,
    )  # (T, H, E)
    if layout.tokens is not None:
        rows = packed.new_zeros(layout.batch * layout.length, *packed.shape[1:])
        packed = rows.index_copy(0, layout.tokens, packed)
    return packed.unflatten(0, (layout.batch, layout.length)), None


def padding_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **options: Any,
) -> Tensor | None:
    """Mask function of transformers' AttentionMaskInterface: pass the 2-D mask on as it is."""
    # a model that looks both ways says so by an overlay, and to its attention by is_causal
    both_ways = getattr(config, "use_bidirectional_attention", False) is True
    if both_ways or torch.compiler.is_compiling():
        unknown = set()
    else:
        unknown = set(_pieces(mask_function)) - _KNOWN_MASKS
    # transformers sets use_vmap exactly when a model overlays its own mask function
    if unknown or (use_vmap and not both_ways):
        raise NotImplementedError(
            f"this model masks attention by a function of its own ({', '.join(sorted(unknown))}),"
            " which apical's attention does not know; call use_kernels(model, attention=False)"
        )
    return attention_mask


def _pieces(mask_function: Callable[..., Any] | None) -> Iterator[str]:
    """Yield the names of the functions that transformers combined into a mask."""
    if mask_function is None:
        return
    name, _, inner = mask_function.__qualname__.partition(".")
    if name not in ("and_masks", "remap_positions_for_packed_sequence") or not inner:
        yield name
        return
    for cell in mask_function.__closure__ or ():
        found = cell.cell_contents
        for piece in found if isinstance(found, tuple) else (found,):
            if callable(piece):
                yield from _pieces(piece)


def _window(
    module: nn.Module, sliding_window: int | None, layout: Layout, columns: int
) -> tuple[int, int]:
    """Return the keys seen to the left and to the right: a window counts the token itself."""
    if sliding_window is None or sliding_window >= columns:
        return -1, -1
    if layout.has_holes:
        raise NotImplementedError(
            f"attention_mask has padding inside a document, and {type(module).__name__} has a"
            f" sliding_window of {sliding_window} columns; move the padding to one end of the rows"
        )
    return sliding_window - 1, sliding_window - 1


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
    options: dict[str, Any],
) -> Layout:
    """Return the layout, or raise what this call asks for and the kernel does not have."""
    if layout is None:
        raise NotImplementedError(
            f"{type(module).__name__} was called without the documents of its batch;"
            " call apical.use_kernels(model) and then the whole model, not a layer of it, and do"
            " not checkpoint a family whose layers keep keyword arguments (see apical.explain)"
        )
    unknown = [name for name, value in options.items() if _changes_attention(name, value)]
    if attention_mask is not None and attention_mask.ndim != 2:
        unknown.append(f"a {attention_mask.ndim}-D attention_mask")
    if unknown:
        raise NotImplementedError(
            f"{type(module).__name__} asks for {', '.join(unknown)}, which apical's attention does"
            " not have; call use_kernels(model, attention=False)"
        )
    return layout


def _changes_attention(name: str, value: object) -> bool:
    if name in _UNSUPPORTED:
        return value is not None
    return isinstance(value, Tensor) and name not in _HARMLESS


def _check_arguments(body: PreTrainedModel, arguments: dict[str, Any]) -> None:
    for name in ("output_attentions", "encoder_hidden_states"):
        # flags and tensors alike: only an absent or a false one is fine
        value = arguments.get(name, getattr(body.config, name, None))
        if value is not None and value is not False:
            raise NotImplementedError(
                f"{name} is not supported by apical's attention;"
                " call use_kernels(model, attention=False)"
            )


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
