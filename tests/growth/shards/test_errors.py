import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from apical.growth.operators import Stack
from apical.growth.shards import grow_checkpoint


def _no_source(source, _):
    shutil.rmtree(source)


def _file_as_source(source, _):
    shutil.rmtree(source)
    source.write_text("")


def _bin_only(source, _):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def _no_weights(source, _):
    (source / "model.safetensors").unlink()


def _corrupt(source, _):
    (source / "model.safetensors").write_bytes(b"\xff" * 100)


def _cut_short(source, _):
    os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 1)


def _quantised(source, _):
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, source / "model.safetensors")


def _lost_shard(source, split):
    split(source, 2)
    (source / "model-00002-of-00002.safetensors").unlink()


def _index_of_another(source, split):
    split(source, 2)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.bias"] = "model-00001-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards_swapped(source, split):
    split(source, 2)
    one, two = source.glob("*.safetensors")
    one.rename(source / "x")
    two.rename(one)
    (source / "x").rename(two)


def _empty_index(source, _):
    (source / "model.safetensors.index.json").write_text("{}")


def _config(**changes):
    def change(source, _):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (_no_source, FileNotFoundError, "is not a directory"),
        (_file_as_source, FileNotFoundError, "is not a directory"),
        (lambda s, _: (s / "config.json").unlink(), FileNotFoundError, "has no config.json"),
        (lambda s, _: (s / "config.json").write_text("{"), ValueError, "not readable JSON"),
        (lambda s, _: (s / "config.json").write_text("[]"), ValueError, "holds a list"),
        (
            lambda s, _: (s / "model.safetensors").unlink(),
            FileNotFoundError,
            "expected safetensors",
        ),
        (_bin_only, FileNotFoundError, "save_pretrained it, which writes safetensors"),
        (_corrupt, ValueError, "not a readable safetensors file"),
        (_cut_short, ValueError, "not a readable safetensors file"),
        (_quantised, ValueError, "stores model.norm.weight as I8; expected one of F64, F32"),
        (_lost_shard, FileNotFoundError, "00002-of-00002.safetensors is in the index but not"),
        (_index_of_another, ValueError, "disagree about model.norm.bias"),
        (_shards_swapped, ValueError, "disagree about lm_head|disagree about model"),
        (_empty_index, ValueError, "has no weight_map"),
        (_config(model_type="mamba"), NotImplementedError, "'mamba' has no table"),
        (_config(model_type="gpt2"), ValueError, "not those of a gpt2"),
        (_config(num_hidden_layers=2), ValueError, "9 unexpected: model.layers.2"),
        (_config(num_hidden_layers=4), ValueError, "9 missing: model.layers.3"),
        (_config(hidden_size=16), ValueError, "of another shape"),
        (_config(hidden_size="wide"), ValueError, "config.json is not valid: .*hidden_size"),
    ],
)
def test_bad_sources_are_one_line_errors(saved, split, tmp_path, spoil, error, match):
    spoil(saved, split)
    with pytest.raises(error, match=match) as caught:
        grow_checkpoint(saved, tmp_path / "big", Stack())
    if error is not NotImplementedError:  # it shows an example in three lines
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("big*"))
