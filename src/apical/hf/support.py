"""What of a model the kernels can replace: one reason per part, in words the user can act on."""

import dis
import inspect

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

# options of a configuration that change attention in ways the kernel does not have yet
_ATTENTION_OPTIONS = ("attn_logit_softcapping", "attention_chunk_size", "alibi")
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
# options whose presence means that logits change between the head and the loss
_LOGIT_OPTIONS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


def attention_refusal(model: PreTrainedModel) -> str | None:
    """Return why a model's attention cannot be replaced, or None where it can."""
    config = model.config
    if not model._can_set_attn_implementation():
        return f"{type(model).__name__} does not call transformers' AttentionInterface"
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "cross-attention is not supported yet"
    if len(_bodies(model)) != 1:
        return "a model made of several models is not supported; call use_kernels on one of them"
    for module in _on_the_way_to_attention(body_of(model)):
        if not _hands_keywords_on(module):
            return f"{type(module).__name__} keeps the documents of a batch from its attention"
    if any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters()):
        return "attention sinks are not supported yet"
    return _attention_option(config)


def _attention_option(config: PreTrainedConfig) -> str | None:
    kinds = getattr(config, "layer_types", None)
    others = sorted(set(kinds or ()) - {"full_attention"})
    if others:
        return f"layers of kind {', '.join(others)} are not supported yet"
    window = getattr(config, "sliding_window", None)
    if kinds is None and window is not None:
        return f"sliding_window={window} is not supported yet; set it to None for short documents"
    for name in _ATTENTION_OPTIONS:
        if getattr(config, name, None):
            return f"{name}={getattr(config, name)} is not supported yet"
    for name in _DROPOUTS:
        if getattr(config, name, None):
            return (
                f"{name}={getattr(config, name)}: build the model with 0, dropout is not supported"
            )
    size = getattr(config, "v_head_dim", None)
    if size is not None and size != getattr(config, "qk_head_dim", size):
        return "values of another head size than keys are not supported yet"
    return None


def loss_refusal(model: PreTrainedModel) -> str | None:
    """Return why a model's loss cannot be fused with its head, or None where it can."""
    head = model.get_output_embeddings()
    if head is None:
        return f"{type(model).__name__} has no language-model head"
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}, not a plain nn.Linear"
    if head.bias is not None:
        return "a head with a bias is not supported yet"
    if head.weight.shape[0] != model.config.vocab_size:
        return (
            f"the head has {head.weight.shape[0]} rows, but config.vocab_size is"
            f" {model.config.vocab_size}"
        )
    for name in _LOGIT_OPTIONS:
        if getattr(model.config, name, None) is not None:
            return f"{name}={getattr(model.config, name)} is not supported yet"
    return _loss_hook(model)


def _loss_hook(model: PreTrainedModel) -> str | None:
    if "loss_function" not in _names_in_forward(model):
        return f"{type(model).__name__} does not call transformers' loss_function"
    if model.loss_function not in (ForCausalLMLoss, ForMaskedLMLoss):
        return "loss_function is not the stock loss of a causal or masked language model"
    return None


def head_of(model: PreTrainedModel) -> nn.Linear:
    """Return the head of a model whose loss can be fused."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head


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


def _on_the_way_to_attention(body: nn.Module) -> list[nn.Module]:
    """Return the modules that call the attention interface, and those that they lie in."""
    modules = dict(body.named_modules())
    paths = [
        path for path, module in modules.items() if "get_interface" in _names_in_forward(module)
    ]
    above = {path.rsplit(".", up)[0] for path in paths for up in range(path.count(".") + 1)}
    # lists of layers are never called
    return [
        body,
        *(modules[path] for path in above if not isinstance(modules[path], nn.ModuleList)),
    ]


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
