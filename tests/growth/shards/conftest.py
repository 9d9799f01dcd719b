"""Checkpoints on disk, as grow_checkpoint reads and writes them."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """Save a tiny model, without transformers' own progress bar: return it and its directory."""

    def save(family, name="small", dtype=torch.float32, head=None):
        model = tiny(family, dtype=dtype, head=head)
        directory = tmp_path / name
        directory.mkdir()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)
        save_file(
            {n: p.detach() for n, p in model.named_parameters()},
            directory / "model.safetensors",
            metadata={"format": "pt"},
        )
        return model, directory

    return save


@pytest.fixture
def saved(checkpoint) -> Path:
    """The directory of a tiny Llama of three layers."""
    return checkpoint("llama-tied")[1]


@pytest.fixture
def tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Read all tensors of a directory."""

    def read(directory: Path) -> dict[str, torch.Tensor]:
        return {
            name: tensor
            for file in directory.glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }

    return read


@pytest.fixture
def split() -> Callable[[Path, int], dict[str, torch.Tensor]]:
    """Write the single file of a checkpoint again as shards with an index."""

    def write(directory: Path, parts: int) -> dict[str, torch.Tensor]:
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        files = [f"model-{i:05d}-of-{parts:05d}.safetensors" for i in range(1, parts + 1)]
        placed = dict(zip(tensors, itertools.cycle(files), strict=False))
        for file in files:
            save_file({n: t for n, t in tensors.items() if placed[n] == file}, directory / file)
        index = {"metadata": {}, "weight_map": placed}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return tensors

    return write
