"""Checkpoints of SLTrain's own code, as models with explicit supports."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apical._extras import require

from ._dense import is_dense
from .convert import replaced
from .files import model_class, set_entry
from .layers import SparseLowRankLinear

_OPTIONS = "splora_config.json"
# transformers of that time saved it; now the model computes it
_DERIVED = ".rotary_emb.inv_freq"


def load_sltrain(
    path: str | Path, *, alpha: float | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Return the model of a directory that SLTrain's code wrote, on the CPU.

    Its layers hold `lora_A` (R, m), `lora_B` (n, R), `sparse_index` (S,) flat int64 positions,
    `sparse_value` (S,), and with trainable scaling `scaling` (1,):
    W = s * lora_B lora_A, with sparse_value added at sparse_index, s = alpha / R or tanh(scaling).
    They become `apical.SparseLowRankLinear` with explicit positions; a trained scale is multiplied
    into `b`. `save_pretrained` writes the result for `apical.load`.

    Args:
        path: directory with config.json and pytorch_model*.bin or model*.safetensors.
        alpha: numerator of the scale; None for `lora_alpha` in splora_config.json, which SLTrain's
            save_pretrained writes.
        dtype: of the model; None for that of the first low-rank factor.

    Raises:
        FileNotFoundError: config or weights are not there.
        ValueError: no layer is SLTrain's, tensors of a layer are missing or do not fit, or alpha is
            neither given nor in the directory.

    Source: Han et al. 2024 (SLTrain, arXiv 2406.02214), and the format of its code.
    """
    path = Path(path)
    transformers = require("transformers", extra="hf", what="apical.load_sltrain")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json; expected a checkpoint directory")
    state = _read(path)
    names = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    if not names:
        raise ValueError(f"{path} has no weight *.lora_A; expected a checkpoint of SLTrain's code")
    config = transformers.AutoConfig.from_pretrained(path)
    dtype = dtype or state[f"{names[0]}.lora_A"].dtype
    model = _empty(transformers, config, dtype)
    layers = {}
    for name in names:
        layers[name] = _layer(model, name, state, alpha=alpha, path=path)
        model.set_submodule(name, layers[name])
    found = model.load_state_dict(state, strict=False)
    _check(path, [*found.missing_keys, *found.unexpected_keys], layers)
    model.tie_weights()
    set_entry(model, replaced(model), [{"kind": "SLTrain"}])
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted(path.glob("model*.safetensors")):
        load_file = require("safetensors.torch", extra="hf", what="apical.load_sltrain").load_file
        state |= load_file(file)
    for file in [] if state else sorted(path.glob("pytorch_model*.bin")):
        state |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not state:
        raise FileNotFoundError(
            f"{path} has neither model*.safetensors nor pytorch_model*.bin; expected weights"
        )
    return {name: tensor for name, tensor in state.items() if not name.endswith(_DERIVED)}


def _empty(transformers: Any, config: Any, dtype: torch.dtype) -> Any:
    from transformers.initialization import no_init_weights

    kind: Any = transformers.AutoModelForCausalLM
    if getattr(config, "architectures", None):
        kind = model_class(config)
    with no_init_weights():
        make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
        return make(config, dtype=dtype)


def _layer(
    model: nn.Module, name: str, state: dict[str, Tensor], *, alpha: float | None, path: Path
) -> SparseLowRankLinear:
    """Take a layer's tensors out of the state, and return it."""
    try:
        old = model.get_submodule(name)
    except AttributeError:
        old = None
    if old is None or not is_dense(old):
        raise ValueError(f"{path} has {name}.lora_A, but its config.json no linear layer {name}")
    down, up, index, values = (
        _take(state, f"{name}.{leaf}", path)
        for leaf in ("lora_A", "lora_B", "sparse_index", "sparse_value")
    )
    rank = len(down)
    scaling = state.pop(f"{name}.scaling", None)
    if scaling is None:
        alpha = _alpha(path) if alpha is None else alpha
    else:
        dtype = old.weight.dtype
        alpha, up = float(rank), up.to(dtype) * scaling.to(dtype).tanh()
    shape = (len(up), down.shape[1])
    expected = (old.out_features, old.in_features)
    if shape != expected or up.shape[1] != rank or index.shape != values.shape:
        raise ValueError(
            f"{path} has {name} of lora_A {tuple(down.shape)}, lora_B {tuple(up.shape)}, "
            f"sparse_index {tuple(index.shape)}, sparse_value {tuple(values.shape)}; expected "
            f"(R, {expected[1]}), ({expected[0]}, R), (S,), (S,)"
        )
    bias = state.pop(f"{name}.bias", None)
    layer = SparseLowRankLinear(
        expected[1],
        expected[0],
        bias is not None,
        rank=rank,
        alpha=alpha,
        support="explicit",
        positions=index,
        dtype=old.weight.dtype,
    )
    with torch.no_grad():
        layer.a.copy_(down)
        layer.b.copy_(up)
        layer.values.copy_(values[index.argsort()])
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
    return layer


def _take(state: dict[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in state:
        raise ValueError(f"{path} has no {name}; expected all tensors of SLTrain's layers")
    return state.pop(name)


def _alpha(path: Path) -> float:
    if not (path / _OPTIONS).is_file():
        raise ValueError(
            f"alpha is None and {path} has no {_OPTIONS}; pass the lora_alpha it was trained with"
        )
    return float(json.loads((path / _OPTIONS).read_text(encoding="utf-8"))["lora_alpha"])


def _check(path: Path, odd: list[str], layers: dict[str, SparseLowRankLinear]) -> None:
    tied = ("lm_head.weight",)
    rest = [n for n in odd if n.rpartition(".")[0] not in layers and n not in tied]
    if rest:
        raise ValueError(
            f"{path} does not hold the model that its config.json says: {min(rest)} is missing or "
            "unexpected"
        )
