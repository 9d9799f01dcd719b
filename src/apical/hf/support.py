"""What of a model the kernels can replace: one reason per part, in words the user can act on."""

import dis
import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# kinds of layers that varlen_attention computes
_LAYERS = frozenset({"full_attention", "sliding_attention"})
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def attention_refusal(model: PreTrainedModel) -> str | None:
    """Return why a model's attention cannot be replaced, or None where it can."""
    config = model.config
    if not model._can_set_attn_implementation():
        return f"{type(model).__name__} does not call transformers' AttentionInterface"
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "cross-attention is not supported yet"
    if len(_bodies(model)) != 1:
        return "a model made of several models is not supported; call use_kernels on one of them"
    body = body_of(model)
    if not attention_modules(body):
        return f"no layer of {type(body).__name__} calls transformers' AttentionInterface"
    if not body._supports_flash_attn:
        # transformers' own word for attention that can do without a dense mask or bias
        return f"{type(body).__name__} declares no support for flash attention"
    return _layer_refusal(body)


def _layer_refusal(body: PreTrainedModel) -> str | None:
    others = sorted(set(getattr(body.config, "layer_types", None) or ()) - _LAYERS)
    if others:
        return f"layers of kind {', '.join(others)} are not supported yet"
    if getattr(body.config, "alibi", None):
        return "alibi=True is not supported through transformers, which passes no slopes"
    convolves = any(isinstance(module, nn.Conv1d) for module in body.modules())
    if convolves or getattr(body.config, "trigram_input", False):
        return "a convolution mixes tokens of neighbouring documents"
    return None


def attention_traits(body: PreTrainedModel) -> list[str]:
    """Return what a body's attention does beyond plain attention, in words."""
    config = body.config
    traits = []
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None)
    if window is not None and "sliding_attention" in kinds:
        traits.append(f"sliding window {window}" + " in some layers" * (len(set(kinds)) > 1))
    if cap := getattr(config, "attn_logit_softcapping", None):
        traits.append(f"softcap {cap}")
    if any(name.rpartition(".")[2] == "sinks" for name, _ in body.named_parameters()):
        traits.append("sinks")
    dropouts = [getattr(config, name, None) or 0.0 for name in _DROPOUTS]
    if any(dropouts):
        traits.append(f"dropout {max(dropouts)} in training")
    return traits


def loss_refusal(model: PreTrainedModel) -> str | None:
    """Return why a model's loss cannot be fused with its head, or None where it can."""
    if model.get_output_embeddings() is None:
        return f"{type(model).__name__} has no language-model head"
    if "labels" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} takes no labels"
    words = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    for head in heads_of(model):
        # other than its type, which FSDP changes
        plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
        if hasattr(head, "base_layer"):
            return "the head has an adapter; train it whole (modules_to_save of PEFT) or not at all"
        if not plain or "forward" in vars(head):
            return f"the head is a {type(head).__name__}, not a plain nn.Linear"
        if words is not None and head.out_features != words:
            return f"the head has {head.out_features} rows, but config.vocab_size is {words}"
    return None


def heads_of(model: PreTrainedModel) -> list[nn.Linear]:
    """Return the heads of a model whose loss can be fused: one, or the copies that PEFT keeps."""
    head: Any = model.get_output_embeddings()
    copies: Any = getattr(head, "modules_to_save", None)
    # a wrapper that calls one of its copies
    return [head] if copies is None else [head.original_module, *copies.values()]


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the module that holds the layers: the innermost model, which no call goes around."""
    return _bodies(model)[0]


def _bodies(model: PreTrainedModel) -> list[PreTrainedModel]:
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [
        outer
        for outer in models
        if not any(inner is not outer for inner in outer.modules() if inner in models)
    ]


def attention_modules(body: nn.Module) -> list[nn.Module]:
    """Return the modules that call the attention interface."""
    return [module for module in body.modules() if "get_interface" in _names_in_forward(module)]


def keeps_keywords(body: nn.Module) -> str | None:
    """Return the module that keeps keyword arguments from the attention below it, or None."""
    modules = dict(body.named_modules())
    found = set(map(id, attention_modules(body)))
    paths = [path for path, module in modules.items() if id(module) in found]
    above = {path.rsplit(".", up)[0] for path in paths for up in range(path.count(".") + 1)}
    # lists of layers are never called
    called = [body, *(modules[p] for p in above if not isinstance(modules[p], nn.ModuleList))]
    return next((type(x).__name__ for x in called if not _hands_keywords_on(x)), None)


def _hands_keywords_on(module: nn.Module) -> bool:
    """Return whether a module's forward takes any keyword arguments and uses them."""
    forward = inspect.unwrap(type(module).forward)
    parameters = inspect.signature(forward).parameters.values()
    names = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
    # some layers take them for show; newer Pythons load two names in one instruction
    used = [i.argval for i in dis.get_instructions(forward)]
    return any(
        n == value or (isinstance(value, tuple) and n in value) for n in names for value in used
    )


def _names_in_forward(module: nn.Module) -> tuple[str, ...]:
    """Return the names that a module's forward uses, read from its code without running it."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return () if code is None else code.co_names
