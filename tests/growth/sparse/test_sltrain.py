"""Directories as SLTrain's code writes them, made here by its definition."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import apical
from apical.growth.sparse import replaced

RANK, DENSITY, ALPHA = 4, 0.1, 8.0
PARTS = ("self_attn", "mlp")


def sltrain_state(
    model: PreTrainedModel, *, scaling: bool = False, alpha: float = ALPHA
) -> dict[str, Tensor]:
    """Return the tensors of SLTrain's model, and make those layers of `model` what they say."""
    draw = torch.Generator().manual_seed(0)
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for name, tensor in model.named_parameters():
        # what is in the files is float32
        tensor.data.copy_(state[name])
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or not any(part in name for part in PARTS):
            continue
        n, m = module.weight.shape
        index = torch.randperm(n * m, generator=draw)[: int(DENSITY * n * m)].sort().values
        down, up, values = (
            torch.randn(shape, generator=draw) for shape in ((RANK, m), (n, RANK), len(index))
        )
        theta = torch.randn(1, generator=draw)
        scale = theta.double().tanh() if scaling else alpha / RANK
        weight = (scale * (up.double() @ down.double())).flatten()
        weight[index] += values.double()
        module.weight.data.copy_(weight.view(n, m))
        del state[f"{name}.weight"]
        state |= {
            f"{name}.lora_A": down,
            f"{name}.lora_B": up,
            f"{name}.sparse_index": index,
            f"{name}.sparse_value": values,
        }
        if scaling:
            state[f"{name}.scaling"] = theta
    return state


def write(directory, model, state, *, options: dict[str, Any] | None, file="pytorch_model.bin"):
    directory.mkdir(exist_ok=True)
    model.config.save_pretrained(directory)
    if options is not None:
        (directory / "splora_config.json").write_text(json.dumps(options))
    if file.endswith(".bin"):
        torch.save(state, directory / file)
    else:
        save_file(state, directory / file)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def llama(tiny) -> PreTrainedModel:
    return tiny("llama-tied", dtype=torch.float64)


OPTIONS = {"r": RANK, "lora_alpha": ALPHA, "sp_ratio": DENSITY, "target_modules": [*PARTS]}


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("scaling", [False, True], ids=["fixed-scale", "trained-scale"])
# with biases, which stay as they are
@pytest.mark.parametrize("family", ["llama-no-groups-yarn", "llama-every-bias", "llama-tied"])
def test_logits_are_those_of_the_definition(tiny, tokens, tmp_path, family, scaling, file):
    model = tiny(family, dtype=torch.float64)
    state = sltrain_state(model, scaling=scaling)
    write(tmp_path, model, state, options=OPTIONS, file=file)
    loaded = apical.load_sltrain(tmp_path)
    assert len(replaced(loaded)) == 3 * 7
    # in double precision, since the layers amplify roundings
    exact = apical.load_sltrain(tmp_path, dtype=torch.float64)
    assert relative(logits(exact, tokens), logits(model, tokens)) < 1e-11
    for name, layer in replaced(loaded).items():
        assert torch.equal(layer.support.flat(), state[f"{name}.sparse_index"])
        assert torch.equal(layer.values, state[f"{name}.sparse_value"])


def test_the_result_is_saved_and_loaded_as_any_other(llama, tokens, tmp_path):
    model = llama
    write(tmp_path / "old", model, sltrain_state(model), options=OPTIONS)
    loaded = apical.load_sltrain(tmp_path / "old", dtype=torch.float64)
    loaded.save_pretrained(tmp_path / "new")
    again = apical.load(tmp_path / "new")
    assert torch.equal(logits(again, tokens), logits(loaded, tokens))
    exported = apical.export_dense(again)
    assert relative(logits(exported, tokens), logits(model, tokens)) < 1e-11


def test_alpha_is_given_or_in_the_directory(llama, tokens, tmp_path):
    model = llama
    state = sltrain_state(model, alpha=3.0)
    write(tmp_path, model, state, options=None)
    with pytest.raises(ValueError, match=r"alpha is None and .*splora_config\.json; pass the lora"):
        apical.load_sltrain(tmp_path)
    # it counts for more than the directory's
    write(tmp_path, model, state, options=OPTIONS)
    loaded = apical.load_sltrain(tmp_path, alpha=3.0, dtype=torch.float64)
    assert relative(logits(loaded, tokens), logits(model, tokens)) < 1e-11


def test_several_files_positions_in_any_order_and_old_buffers(llama, tokens, tmp_path):
    model = llama
    state = sltrain_state(model)
    for name in [name for name in state if name.endswith("sparse_index")]:
        order = torch.randperm(len(state[name]))
        value = name.replace("sparse_index", "sparse_value")
        state[name], state[value] = state[name][order], state[value][order]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = list(state)
    write(tmp_path, model, {n: state[n] for n in names[::2]}, options=OPTIONS)
    torch.save({n: state[n] for n in names[1::2]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    loaded = apical.load_sltrain(tmp_path, dtype=torch.float64)
    assert relative(logits(loaded, tokens), logits(model, tokens)) < 1e-11


def test_the_dtype_is_the_checkpoints_or_the_one_asked_for(llama, tmp_path):
    model = llama
    state = sltrain_state(model)
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in state.items()}
    write(tmp_path, model, half, options=OPTIONS)
    assert {p.dtype for p in apical.load_sltrain(tmp_path).parameters()} == {torch.bfloat16}
    wide = apical.load_sltrain(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{NAME}.sparse_value"), rf"has no {NAME}\.sparse_value; expected all"),
        (
            lambda s: s.update({f"{NAME}.lora_B": torch.ones(47, RANK)}),
            r"lora_B \(47, 4\).* expected \(R, 32\), \(48, R\)",
        ),
        (
            lambda s: s.update({f"{NAME}.sparse_value": torch.ones(3)}),
            r"sparse_value \(3,\); expected",
        ),
        (
            lambda s: s[f"{NAME}.sparse_index"].fill_(48 * 32),
            r"positions",
        ),
        (lambda s: s.pop("model.norm.weight"), r"model\.norm\.weight is missing or unexpected"),
        (
            lambda s: s.update({"model.layers.9.mlp.up_proj.lora_A": torch.ones(2, 2)}),
            r"its config\.json no linear layer model\.layers\.9",
        ),
        (lambda s: [s.pop(n) for n in [*s] if n.endswith("lora_A")], r"no weight \*\.lora_A"),
    ],
    ids=["value", "rows", "count", "outside", "norm", "depth", "stock"],
)
def test_what_does_not_fit_is_refused(llama, tmp_path, change, message):
    model = llama
    state = sltrain_state(model)
    change(state)
    write(tmp_path, model, state, options=OPTIONS)
    with pytest.raises(ValueError, match=message) as caught:
        apical.load_sltrain(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_not_there(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        apical.load_sltrain(tmp_path)
    tiny("llama-tied").config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither model\*\.safetensors nor pytorch_model"):
        apical.load_sltrain(tmp_path)
    tiny("llama-tied").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a checkpoint of SLTrain's code"):
        apical.load_sltrain(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None
