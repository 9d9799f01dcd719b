"""Training steps of a small Llama: dense, low-rank, SLTrain's way, and with our layers."""

import functools
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from race import Call, Case, Lineup, Outputs, Peer
from sparse_peers import Materialised
from torch import Tensor, nn

import apical

log = logging.getLogger(__name__)

_RANK, _DENSITY = 0.25, 0.03
_KINDS = ("dense", "low-rank", "SLTrain's way", "uniform", "grouped")
_OURS = "grouped"


class SLTrainLinear(nn.Module):
    """A layer as SLTrain's code computes it, with an index of 64 bits an entry."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.a, self.b, self.values, self.scale = layer.a, layer.b, layer.values, layer.scale
        self.index: Tensor
        self.register_buffer("index", layer.support.flat())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        operands = (flat, self.a, self.b, self.values, self.index, self.scale)
        return cast(Tensor, Materialised.apply(*operands)).view(*x.shape[:-1], -1)


def test_sparse_training(case: Case, race: Callable[[Lineup], object]) -> None:
    race(case.build())


def cases(*, quick: bool, device: str) -> list[Case]:
    """Return the race: one training step with AdamW, the weights and moments included."""
    if importlib.util.find_spec("transformers") is None:
        log.warning("sparse_training: not run, transformers is not installed")
        return []
    # width, layers, tokens
    size = (256, 1, 64) if quick else (2048, 12, 16384) if device == "cuda" else (512, 8, 2048)
    return [Case("llama-step", functools.partial(_lineup, *size, device))]


def _lineup(width: int, layers: int, tokens: int, device: str) -> Lineup:
    calls = {kind: _step(_model(kind, width, layers, device), tokens) for kind in _KINDS}
    memory = {kind: _peak_mb(kind, width, layers, tokens, device) for kind in _KINDS}
    shown = ", ".join(f"{kind} {mb:.0f} MB" for kind, mb in memory.items())
    peers = {
        f"{kind}, {memory[kind]:.0f} MB in all": Peer(call, limit=True)
        for kind, call in calls.items()
        if kind != _OURS
    }
    what = (
        f"Llama of {layers} layers of width {width}, {tokens} tokens a step in documents of up to "
        f"256; forward, backward and AdamW. Ours is the layer with {_OURS} support; rank "
        f"{_RANK:g} of the width, density {_DENSITY:g}. Highest resident memory of a process that "
        f"takes two steps, less what it has before there is a model: {shown}."
    )
    return Lineup(ours=calls[_OURS], peers=peers, what=what)


def _model(kind: str, width: int, layers: int, device: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    model = cast(Any, transformers.LlamaForCausalLM(config)).to(device).train()
    if kind == "low-rank":
        apical.sparsify(model, apical.LowRank(rank=_RANK, init="cola"))
    elif kind != "dense":
        support = "uniform" if kind == "SLTrain's way" else kind
        rule = apical.SparseLowRank(
            rank=_RANK, density=_DENSITY, support=cast(Any, support), init="sltrain"
        )
        apical.sparsify(model, rule)
    if kind == "SLTrain's way":
        for name, layer in list(model.named_modules()):
            if isinstance(layer, apical.SparseLowRankLinear):
                model.set_submodule(name, SLTrainLinear(layer))
    return apical.use_kernels(model)


def _step(model: Any, tokens: int) -> Call:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(8192, (size,), generator=generator) for size in _lengths(tokens)]
    row = apical.PackedCollator()([{"input_ids": ids, "labels": ids.clone()} for ids in texts])
    batch = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in row.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def call() -> Outputs:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (loss.detach()[None],)

    return call


def _lengths(tokens: int) -> list[int]:
    lengths = [256, 192, 128, 64] * (tokens // 640)
    left = tokens - sum(lengths)
    return lengths + [min(256, left - start) for start in range(0, left, 256)]


def _peak_mb(kind: str, width: int, layers: int, tokens: int, device: str) -> float:
    """Return the memory of training in a process of its own."""
    arguments = [kind, width, layers, tokens, device, torch.get_num_threads()]
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _weigh(kind: str, width: str, layers: str, tokens: str, device: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    # libraries first: they are nobody's memory
    _step(_model(kind, 256, 1, device), 64)()
    before = _resident_mb(device)
    call = _step(_model(kind, int(width), int(layers), device), int(tokens))
    call()
    call()
    print(_peak_resident_mb(device) - before)


def _resident_mb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.memory_allocated() / 1e6
    return _status("VmRSS:")


def _peak_resident_mb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return _status("VmHWM:")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1e3


if __name__ == "__main__":
    _weigh(*sys.argv[1:])
