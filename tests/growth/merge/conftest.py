"""Checkpoints to merge."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def save(tiny, tmp_path):
    """Save a tiny model: `save("a")` returns it and its directory."""

    def _save(name, family="llama-tied", dtype=torch.float32):
        model = tiny(family, dtype=dtype)
        directory = tmp_path / name
        directory.mkdir()
        model.config.save_pretrained(directory)
        weights = {n: p.detach() for n, p in model.named_parameters()}
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return model, directory

    return _save


@pytest.fixture
def weights_of():
    """Return all tensors of a directory, whatever its files."""

    def _weights(directory):
        files = directory.glob("*.safetensors")
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    return _weights


@pytest.fixture
def change(weights_of):
    """Write the single file of a checkpoint again, with other tensors or in parts."""

    def _change(directory, tensors=None, *, parts=1):
        tensors = weights_of(directory) if tensors is None else tensors
        (directory / "model.safetensors").unlink()
        if parts == 1:
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
            return
        names = sorted(tensors)
        placed = {name: f"part-{i % parts}.safetensors" for i, name in enumerate(names)}
        for file in set(placed.values()):
            some = {name: tensors[name] for name in names if placed[name] == file}
            save_file(some, directory / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": placed}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return _change
