import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apical.growth import checkpoint_output
from apical.growth.apply import grow
from apical.growth.operators import OPERATORS, Stack, Zero
from apical.growth.plan import GrowthPlan
from apical.growth.shards import grow_checkpoint

_OPERATORS = pytest.mark.parametrize("operator", [op() for op in OPERATORS.values()], ids=OPERATORS)


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """A saved model: config and weights, without transformers' own progress bar."""

    def save(family, name="small", dtype=torch.float32):
        model = tiny(family, dtype=dtype)
        directory = tmp_path / name
        directory.mkdir()
        model.config.save_pretrained(directory)
        model.generation_config.save_pretrained(directory)
        save_file(
            {n: p.detach() for n, p in model.named_parameters()},
            directory / "model.safetensors",
            metadata={"format": "pt"},
        )
        return model, directory

    return save


@pytest.fixture
def saved(checkpoint):
    return checkpoint("llama-tied")[1]


def _tensors(directory):
    return {
        name: tensor
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def _split(directory, parts):
    """Write the single file of a checkpoint again as shards with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = [f"model-{i:05d}-of-{parts:05d}.safetensors" for i in range(1, parts + 1)]
    placed = dict(zip(tensors, itertools.cycle(files), strict=False))
    for file in files:
        save_file({n: t for n, t in tensors.items() if placed[n] == file}, directory / file)
    index = {"metadata": {}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


@_OPERATORS
def test_disk_and_live_model_grow_alike(checkpoint, family, tokens, tmp_path, operator):
    model, source = checkpoint(family)
    plan = grow_checkpoint(source, tmp_path / "big", operator)
    live = grow(model, operator)
    assert plan == operator.plan(model.config.to_dict())
    expected = dict(live.named_parameters())
    written = _tensors(tmp_path / "big")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, expected[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "big")
    assert type(loaded) is type(model)
    for key in ("num_hidden_layers", "layer_types", "max_window_layers", "tie_word_embeddings"):
        assert getattr(loaded.config, key, None) == getattr(live.config, key, None), key
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, live(tokens).logits)


def test_zero_on_disk_preserves_the_function(checkpoint, family, tokens, tmp_path):
    model, source = checkpoint(family, dtype=torch.float64)
    grow_checkpoint(source, tmp_path / "big", Zero(3))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "big")
    assert loaded.dtype == torch.float64
    with torch.no_grad():
        old, new = model(tokens).logits, loaded(tokens).logits
    assert (new - old).abs().max() <= 1e-10 * old.abs().max()


def test_every_dtype_is_kept_bit_for_bit(saved, tmp_path):
    tensors = load_file(saved / "model.safetensors")
    dtypes = itertools.cycle([torch.bfloat16, torch.float16, torch.float32, torch.float64])
    tensors = {n: t.to(dtype) for (n, t), dtype in zip(tensors.items(), dtypes, strict=False)}
    # a payload in a NaN and a negative zero would not survive arithmetic
    tensors["model.norm.weight"] = torch.tensor([0x7FC12345, -(2**31)] * 16, dtype=torch.int32)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.float32)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    plan = grow_checkpoint(saved, tmp_path / "big", Stack())
    for name, tensor in _tensors(tmp_path / "big").items():
        old = tensors[plan.sources(name).terms[0][0]]
        assert tensor.dtype == old.dtype
        assert torch.equal(tensor.view(torch.uint8), old.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("limit", [1, 10_000, 10**9], ids=["one each", "a few each", "one file"])
def test_shards_in_other_shards_out(saved, tmp_path, limit):
    tensors = _split(saved, 3)
    plan = grow_checkpoint(saved, tmp_path / "big", Stack(), max_shard_bytes=limit)
    written = _tensors(tmp_path / "big")
    for name, tensor in written.items():
        assert torch.equal(tensor, tensors[plan.sources(name).terms[0][0]]), name
    files = sorted(path.name for path in (tmp_path / "big").glob("*.safetensors"))
    if limit == 10**9:
        assert files == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "big" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["weight_map"].keys() == written.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    for file in files:
        held = load_file(tmp_path / "big" / file)
        assert sum(t.nbytes for t in held.values()) <= limit or len(held) == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "big")


def test_a_tied_head_that_is_stored_twice_stays_so(saved, tmp_path):
    tensors = load_file(saved / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    grow_checkpoint(saved, tmp_path / "big", Stack())
    assert "lm_head.weight" in _tensors(tmp_path / "big")


def test_frequencies_of_old_checkpoints_are_dropped(saved, tmp_path):
    tensors = load_file(saved / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, saved / "model.safetensors")
    grow_checkpoint(saved, tmp_path / "big", Stack())
    assert not any("inv_freq" in name for name in _tensors(tmp_path / "big"))


def test_configs_that_leave_out_what_is_the_default(checkpoint, tokens, tmp_path):
    model, source = checkpoint("qwen2-window-from-layer-2")
    config = json.loads((source / "config.json").read_text())
    del config["layer_types"]  # as written by releases before transformers 4.53
    (source / "config.json").write_text(json.dumps(config | {"a_key_of_ours": [1]}))
    grow_checkpoint(source, tmp_path / "big", Stack())
    grown = json.loads((tmp_path / "big" / "config.json").read_text())
    assert grown["a_key_of_ours"] == [1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "big")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, grow(model, Stack())(tokens).logits)


def test_companion_files_come_along_and_weights_do_not(saved, tmp_path):
    kept = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"]
    kept += ["generation_config.json", "additional_chat_templates/tool_use.jinja"]
    (saved / "additional_chat_templates").mkdir()
    for name in kept:
        (saved / name).write_text(f'{{"text": "{name} é"}}')
    for name in ["optimizer.pt", "pytorch_model.bin", "trainer_state.json", "README.md"]:
        (saved / name).write_text("old")
    plan = grow_checkpoint(saved, tmp_path / "a" / "big", Zero())
    out = tmp_path / "a" / "big"
    for name in kept:
        assert (out / name).read_text() == (saved / name).read_text()
    ours = {"README.md", "apical_growth.json", "config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == ours | {Path(k).parts[0] for k in kept}
    assert GrowthPlan.from_dict(json.loads((out / "apical_growth.json").read_text())) == plan
    card = (out / "README.md").read_text()
    assert str(plan) in card
    assert "small, grown by zero" in card
    assert str(tmp_path) not in card
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["big"]


def test_new_directories_are_as_readable_as_any(saved, tmp_path):
    grow_checkpoint(saved, tmp_path / "big", Stack())
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "big").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "make",
    [Path.mkdir, lambda out: out.write_text("mine"), lambda out: out.symlink_to("nowhere")],
    ids=["empty directory", "file", "dangling link"],
)
def test_nothing_is_overwritten(saved, tmp_path, make):
    out = tmp_path / "big"
    make(out)
    before = out.lstat()
    with pytest.raises(FileExistsError, match=r"big exists and is not overwritten"):
        grow_checkpoint(saved, out, Stack())
    assert (out.lstat().st_ino, out.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [path.name for path in tmp_path.glob("big*")] == ["big"]


def _no_source(source):
    shutil.rmtree(source)


def _file_as_source(source):
    shutil.rmtree(source)
    source.write_text("")


def _bin_only(source):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def _corrupt(source):
    (source / "model.safetensors").write_bytes(b"\xff" * 100)


def _cut_short(source):
    os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 1)


def _quantised(source):
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, source / "model.safetensors")


def _lost_shard(source):
    _split(source, 2)
    (source / "model-00002-of-00002.safetensors").unlink()


def _index_of_another(source):
    _split(source, 2)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.bias"] = "model-00001-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards_swapped(source):
    _split(source, 2)
    one, two = source.glob("*.safetensors")
    one.rename(source / "x")
    two.rename(one)
    (source / "x").rename(two)


def _empty_index(source):
    (source / "model.safetensors.index.json").write_text("{}")


def _config(**changes):
    def change(source):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (_no_source, FileNotFoundError, "is not a directory"),
        (_file_as_source, FileNotFoundError, "is not a directory"),
        (lambda s: (s / "config.json").unlink(), FileNotFoundError, "has no config.json"),
        (lambda s: (s / "config.json").write_text("{"), ValueError, "not readable JSON"),
        (lambda s: (s / "config.json").write_text("[]"), ValueError, "holds a list"),
        (lambda s: (s / "model.safetensors").unlink(), FileNotFoundError, "expected safetensors"),
        (_bin_only, FileNotFoundError, "save_pretrained it, which writes safetensors"),
        (_corrupt, ValueError, "not a readable safetensors file"),
        (_cut_short, ValueError, "not a readable safetensors file"),
        (_quantised, ValueError, "stores model.norm.weight as I8; expected one of F64, F32"),
        (_lost_shard, FileNotFoundError, "00002-of-00002.safetensors is in the index but not"),
        (_index_of_another, ValueError, "disagree about model.norm.bias"),
        (_shards_swapped, ValueError, "disagree about lm_head|disagree about model"),
        (_empty_index, ValueError, "has no weight_map"),
        (_config(model_type="gpt2"), NotImplementedError, "'gpt2' has no table"),
        (_config(num_hidden_layers=2), ValueError, "9 unexpected: model.layers.2"),
        (_config(num_hidden_layers=4), ValueError, "9 missing: model.layers.3"),
        (_config(hidden_size=16), ValueError, "of another shape"),
        (_config(hidden_size="wide"), ValueError, "config.json is not valid: .*hidden_size"),
    ],
)
def test_bad_sources_are_one_line_errors(saved, tmp_path, spoil, error, match):
    spoil(saved)
    with pytest.raises(error, match=match) as caught:
        grow_checkpoint(saved, tmp_path / "big", Stack())
    if error is not NotImplementedError:  # it shows an example in three lines
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("big*"))


@pytest.mark.parametrize("limit", [0, -1, 1.5, "5GB"], ids=lambda value: repr(value))
def test_shard_sizes_that_are_no_positive_integer_are_refused(saved, tmp_path, limit):
    with pytest.raises(ValueError, match=r"max_shard_bytes is .*expected a positive integer"):
        grow_checkpoint(saved, tmp_path / "big", Stack(), max_shard_bytes=limit)


def test_free_space_is_checked_before_anything_is_written(saved, tmp_path, monkeypatch):
    needed = sum(t.nbytes for t in _tensors(saved).values())  # the grown one needs more
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    with pytest.raises(OSError, match=r"has .* free, the grown checkpoint needs"):
        grow_checkpoint(saved, tmp_path / "big", Stack())
    assert not list(tmp_path.glob("big*"))


def test_a_disk_that_fills_up_leaves_nothing(saved, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a write beyond it fails
    try:
        with pytest.raises(OSError, match=r"^model\.safetensors could not be written: ") as caught:
            grow_checkpoint(saved, tmp_path / "big", Stack())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("big*"))


def test_an_interrupt_leaves_nothing(saved, tmp_path, monkeypatch):
    def interrupt(source, out):
        assert list(out.glob("*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_output, "copy_others", interrupt)
    with pytest.raises(KeyboardInterrupt):
        grow_checkpoint(saved, tmp_path / "big", Stack())
    assert not list(tmp_path.glob("big*"))


def _run(code, *arguments):
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_kill_leaves_no_checkpoint_and_the_next_run_succeeds(saved, tmp_path):
    code = """
        import os, signal, sys
        from apical.growth import checkpoint_output, shards
        from apical.growth.operators import Stack
        write = checkpoint_output._write_shard
        def write_then_die(path, *rest):
            write(path, *rest)
            if path.name.startswith("model-00002"):
                os.kill(os.getpid(), signal.SIGKILL)
        checkpoint_output._write_shard = write_then_die
        shards.grow_checkpoint(sys.argv[1], sys.argv[2], Stack(), max_shard_bytes=10_000)
    """
    done = _run(code, saved, tmp_path / "big")
    assert done.returncode == -9, done.stderr
    (left,) = tmp_path.glob("big*")
    assert left.name.startswith("big.tmp-")
    assert len(list(left.glob("*.safetensors"))) == 2
    grow_checkpoint(saved, tmp_path / "big", Stack())
    assert (tmp_path / "big" / "config.json").is_file()


def _sparse_checkpoint(directory, config):
    """Write a checkpoint of zeros that takes no room on the disk."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    header, offset = {}, 0
    for name, p in model.named_parameters():
        end = offset + 4 * p.numel()
        header[name] = {"dtype": "F32", "shape": list(p.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    directory.mkdir()
    config.save_pretrained(directory)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return offset


def test_memory_is_bounded_by_one_output_shard(tiny, tmp_path):
    config = tiny("llama-tied").config
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 9}
    config.update(sizes | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64})
    assert _sparse_checkpoint(tmp_path / "small", config) > 400e6
    # the high-water mark of this process alone: ru_maxrss would start at that of the parent
    code = """
        import sys
        from pathlib import Path
        from apical.growth.operators import Stack
        from apical.growth.checkpoint_files import read_config, with_defaults
        from apical.growth.shards import grow_checkpoint
        def peak():
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1e3
        with_defaults(read_config(Path(sys.argv[1])))  # imports transformers
        before = peak()
        grow_checkpoint(sys.argv[1], sys.argv[2], Stack(), max_shard_bytes=50_000_000)
        print(peak() - before)
    """
    done = _run(code, tmp_path / "small", tmp_path / "big")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "big").glob("*.safetensors"))) >= 16
    # one shard of 50 MB, one tensor of 12 MB, and what the allocator keeps; the whole is 800 MB
    assert float(done.stdout) < 110, f"{done.stdout} MB above the baseline"


def test_progress_is_shown_when_asked_for(saved, tmp_path, capsys):
    grow_checkpoint(saved, tmp_path / "quiet", Stack())
    assert capsys.readouterr() == ("", "")
    grow_checkpoint(saved, tmp_path / "big", Stack(), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "growing: 100%" in err
