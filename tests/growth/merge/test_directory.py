"""Checkpoint directories: what is written, and what is refused before anything is."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

import apical
from apical.growth import checkpoint_output

_TINY_TOKENIZER = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "<s>"}]}


@pytest.mark.parametrize("family", ["llama-tied", "qwen3-every-bias-tied", "olmo2-post-norms"])
@pytest.mark.parametrize(
    "method",
    [apical.Average(), apical.EMA(0.7), apical.Linear([1.0, -0.5, 2.0]), apical.TaskVectors(0.3)],
    ids=lambda method: type(method).__name__,
)
def test_disk_and_live_models_merge_alike(save, tokens, tmp_path, weights_of, method, family):
    models, sources = zip(*(save(name, family) for name in "abc"), strict=True)
    shares = apical.merge_checkpoints(sources, tmp_path / "out", method)
    assert shares == method.coefficients(3)
    live = apical.merge(models, method)
    written = weights_of(tmp_path / "out")
    expected = dict(live.named_parameters())
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, live(tokens).logits)


@pytest.mark.parametrize("limit", [1, 10_000, 10**9], ids=["one each", "a few each", "one file"])
def test_shards_may_be_split_in_any_way(save, tmp_path, weights_of, change, limit):
    models, sources = zip(*(save(name) for name in "abc"), strict=True)
    change(sources[1], parts=2)
    change(sources[2], parts=5)
    out = tmp_path / "out"
    apical.merge_checkpoints(sources, out, apical.Average(), max_shard_bytes=limit)
    expected = apical.merge(models, apical.Average())
    for name, parameter in expected.named_parameters():
        assert torch.equal(weights_of(out)[name], parameter), name
    assert (len(list(out.glob("*.safetensors"))) == 1) == (limit == 10**9)
    AutoModelForCausalLM.from_pretrained(out)


def test_one_checkpoint_is_itself(save, tmp_path, weights_of, change):
    _, source = save("a")
    tensors = weights_of(source)
    # a payload in a NaN and a negative zero would not survive arithmetic
    bits = torch.tensor([0x7FC12345, -(2**31)] * 16, dtype=torch.int32)
    tensors["model.norm.weight"] = bits.view(torch.float32)
    change(source, tensors)
    apical.merge_checkpoints([source], tmp_path / "out", apical.Average())
    for name, tensor in weights_of(tmp_path / "out").items():
        assert torch.equal(tensor.view(torch.int32), tensors[name].view(torch.int32)), name


def test_dtypes_are_those_of_the_first(save, tmp_path, weights_of):
    (low, a), (high, b) = save("a", dtype=torch.bfloat16), save("b", dtype=torch.float32)
    apical.merge_checkpoints([a, b], tmp_path / "low", apical.Average())
    apical.merge_checkpoints([b, a], tmp_path / "high", apical.Average())
    assert {t.dtype for t in weights_of(tmp_path / "low").values()} == {torch.bfloat16}
    for name, tensor in weights_of(tmp_path / "high").items():
        one, other = (model.get_parameter(name).double() for model in (low, high))
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), (one + other) / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("where", [0, 1], ids=["in the first", "in the second"])
def test_a_tied_head_may_be_stored_twice(save, tmp_path, weights_of, change, where):
    models, sources = zip(save("a"), save("b"), strict=True)
    tensors = weights_of(sources[where])
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    change(sources[where], twice)
    apical.merge_checkpoints(sources, tmp_path / "out", apical.Average())
    written = weights_of(tmp_path / "out")
    expected = apical.merge(models, apical.Average()).get_input_embeddings().weight
    assert ("lm_head.weight" in written) == (where == 0)
    assert torch.equal(written["model.embed_tokens.weight"], expected)
    assert torch.equal(written.get("lm_head.weight", expected), expected)


def test_a_head_that_is_not_that_of_the_embeddings_is_not_left_out(
    save, tmp_path, weights_of, change
):
    _, sources = zip(save("a"), save("b"), strict=True)
    tensors = weights_of(sources[1])
    change(sources[1], tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match=r"lm_head.weight is in .*b and not in .*a \(1 tensors"):
        apical.merge_checkpoints(sources, tmp_path / "out", apical.Average())


def test_what_comes_along_is_that_of_the_first(save, tmp_path):
    (_, a), (_, b) = save("a"), save("b")
    (a / "tokenizer.json").write_text(json.dumps(_TINY_TOKENIZER))
    (a / "LICENSE").write_text("of a")
    (b / "LICENSE").write_text("of b")
    (b / "optimizer.pt").write_text("large")
    out = tmp_path / "there" / "out"
    apical.merge_checkpoints([a, b], out, apical.Linear([0.5, 0.25]))
    names = {"README.md", "apical_merge.json", "config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == names | {"tokenizer.json", "LICENSE"}
    assert (out / "LICENSE").read_text() == "of a"
    assert (out / "config.json").read_text() == (a / "config.json").read_text()
    record = json.loads((out / "apical_merge.json").read_text())
    assert record == {
        "method": "Linear",
        "options": {"weights": [0.5, 0.25]},
        "sources": [{"name": "a", "coefficient": 0.5}, {"name": "b", "coefficient": 0.25}],
    }
    card = (out / "README.md").read_text()
    assert "# out, merged by Linear(weights=[0.5, 0.25])" in card
    assert "| b | 0.25 |" in card
    assert str(tmp_path) not in card + json.dumps(record)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["out"]


def test_a_greedy_soup_reads_directories_and_leaves_only_its_own(
    save, tokens, tmp_path, weights_of
):
    models, sources = zip(*(save(name) for name in "abc"), strict=True)
    seen = []

    def loss(model):
        with torch.no_grad():
            return model(input_ids=tokens, labels=tokens).loss.item()

    def score(directory):
        seen.append(directory)
        return -loss(AutoModelForCausalLM.from_pretrained(directory))

    out = tmp_path / "out"
    shares = apical.merge_checkpoints(sources, out, apical.GreedySoup(score))
    expected = apical.merge(models, apical.GreedySoup(lambda model: -loss(model)))
    for name, parameter in expected.named_parameters():
        assert torch.equal(weights_of(out)[name], parameter), name
    assert seen[:3] == list(sources)
    assert len(seen) == 5
    assert sum(shares) == 1
    assert not any(directory.exists() for directory in seen[3:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "out"]
    assert json.loads((out / "apical_merge.json").read_text())["method"] == "GreedySoup"


def test_a_score_that_fails_leaves_nothing(save, tmp_path):
    _, sources = zip(save("a"), save("b"), strict=True)

    def score(directory):
        if directory not in sources:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        apical.merge_checkpoints(sources, tmp_path / "out", apical.GreedySoup(score))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_interrupt_leaves_nothing(save, tmp_path, monkeypatch):
    def interrupt(source, out):
        assert list(out.glob("*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_output, "copy_others", interrupt)
    with pytest.raises(KeyboardInterrupt):
        apical.merge_checkpoints([save("a")[1]], tmp_path / "out", apical.Average())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def _config(**changes):
    def spoil(directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return spoil


def _tokenizer(**changes):
    def spoil(directory):
        first = directory.with_name("a")
        (first / "tokenizer.json").write_text(json.dumps(_TINY_TOKENIZER))
        (directory / "tokenizer.json").write_text(json.dumps(_TINY_TOKENIZER | changes))

    return spoil


def _vocabulary(directory):
    (directory.with_name("a") / "vocab.txt").write_text("a\nb")
    (directory / "vocab.txt").write_text("b\na")


def _lost_shard(directory):
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"w": "lost"}}')


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (lambda b: b.rename(b.with_name("x")), FileNotFoundError, "b is not a directory"),
        (lambda b: (b / "config.json").unlink(), FileNotFoundError, "b has no config.json"),
        (lambda b: (b / "model.safetensors").unlink(), FileNotFoundError, "expected safetensors"),
        (lambda b: (b / "model.safetensors").write_bytes(b"\xff" * 99), ValueError, "not a read"),
        (_lost_shard, FileNotFoundError, "lost is in the index but not"),
        (_config(model_type="qwen3"), ValueError, "model_type is 'qwen3' in the config of .*b and"),
        (_config(model_type="mine"), ValueError, "model_type 'mine', which transformers does not"),
        (_config(vocab_size=65), ValueError, "vocab_size is 65 .* and 64 .* one architecture"),
        (_config(num_attention_heads=8), ValueError, "num_attention_heads is 8"),
        (_config(apical={"sparse": {}}), ValueError, "b has sparse layers"),
        (_config(quantization_config={"bits": 4}), ValueError, "b is quantised"),
        (_tokenizer(model={"vocab": {"b": 0}}), ValueError, "tokenizer.json of .*b and .*a differ"),
        (_tokenizer(added_tokens=[]), ValueError, "expected models with the same tokenizer"),
        (_vocabulary, ValueError, "vocab.txt of .*b and .*a differ"),
    ],
)
def test_sources_that_do_not_go_together(save, tmp_path, spoil, error, match):
    (_, a), (_, b) = save("a"), save("b")
    spoil(b)
    with pytest.raises(error, match=match) as caught:
        apical.merge_checkpoints([a, b], tmp_path / "out", apical.Average())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_tokenizers_that_number_tokens_alike_are_the_same(save, tmp_path):
    (_, a), (_, b) = save("a"), save("b")
    _tokenizer(truncation={"max_length": 3})(b)
    _config(eos_token_id=7, transformers_version="4.0", dtype="float16")(b)
    apical.merge_checkpoints([a, b], tmp_path / "out", apical.Average())


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (
            lambda t: t.pop("model.norm.weight"),
            r"model.norm.weight is in .*a and not in .*b \(1 te",
        ),
        (lambda t: t.update(new=torch.ones(1)), "new is in .*b and not in .*a"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"model.norm.weight has shape \(32,\) in .*a and \(31,\) in .*b; expected the same",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}),
            "model.norm.weight holds torch.float32 in .*a, and others .torch.int64. in .*b; integ",
        ),
    ],
    ids=["missing", "unexpected", "shape", "integers"],
)
def test_tensors_that_do_not_agree(save, tmp_path, weights_of, change, edit, match):
    (_, a), (_, b) = save("a"), save("b")
    tensors = weights_of(b)
    edit(tensors)
    change(b, tensors)
    with pytest.raises(ValueError, match=match) as caught:
        apical.merge_checkpoints([a, b], tmp_path / "out", apical.Average())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("other", [5, 6], ids=["equal", "another"])
def test_integers_must_be_equal(save, tmp_path, weights_of, change, other):
    sources = [save("a")[1], save("b")[1]]
    for source, number in zip(sources, (5, other), strict=True):
        change(source, weights_of(source) | {"steps": torch.tensor([number])})
    if other == 5:
        apical.merge_checkpoints(sources, tmp_path / "out", apical.Linear([2.0, 1.0]))
        assert weights_of(tmp_path / "out")["steps"].tolist() == [5]
        return
    with pytest.raises(ValueError, match=r"steps holds torch.int64 .* expected equal"):
        apical.merge_checkpoints(sources, tmp_path / "out", apical.Average())


def test_what_a_model_computes_itself_is_not_compared(save, tmp_path, weights_of, change):
    (_, a), (_, b) = save("a"), save("b")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change(b, weights_of(b) | old)
    apical.merge_checkpoints([b, a], tmp_path / "out", apical.Average())
    assert not any("inv_freq" in name for name in weights_of(tmp_path / "out"))


def test_models_of_the_hub_go_by_their_names(save, tmp_path, monkeypatch):
    _, source = save("a")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(source))
    apical.merge_checkpoints(["owner/model", source], tmp_path / "out", apical.Average())
    record = json.loads((tmp_path / "out" / "apical_merge.json").read_text())
    assert [row["name"] for row in record["sources"]] == ["owner/model", "a"]


def test_no_sources_and_a_wrong_count(save, tmp_path):
    with pytest.raises(ValueError, match="sources is empty"):
        apical.merge_checkpoints([], tmp_path / "out", apical.Average())
    with pytest.raises(ValueError, match="weights has 2 numbers; expected 1"):
        apical.merge_checkpoints([save("a")[1]], tmp_path / "out", apical.Linear([1.0, 2.0]))
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_overwritten(save, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists and is not overwritten"):
        apical.merge_checkpoints([save("a")[1]], tmp_path / "out", apical.Average())
    assert not list((tmp_path / "out").iterdir())


def _peak_above_start(code, *arguments):
    """Run code in a fresh process; return what it prints: its high-water mark, in MB."""
    start = """
        import sys
        from pathlib import Path
        def peak():
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1e3
    """
    text = textwrap.dedent(start) + textwrap.dedent(code)
    command = [sys.executable, "-W", "error", "-c", text, *map(str, arguments)]
    # freed memory goes back at once, so that the peak is that of what is held
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_memory_is_a_few_tensors(save, tiny, tmp_path):
    """Three checkpoints of zeros, 207 MB each, whose largest tensor has 12 MB."""
    config = tiny("llama-tied").config
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 9}
    config.update(sizes | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64})
    with torch.device("meta"):
        names = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    sources = [tmp_path / name for name in "abc"]
    for source in sources:
        _sparse_checkpoint(source, config, names)
    code = """
        import apical
        sources, out, small = sys.argv[1:4], sys.argv[4], sys.argv[5]
        apical.merge_checkpoints([small] * 3, f"{small}-out", apical.Average())  # imports all
        before = peak()
        apical.merge_checkpoints(sources, out, apical.Average())
        print(peak() - before)
    """
    # three tensors in bfloat16 and two in float32 of 3 M elements are 41 MB; 51 MB were measured
    # (2026-11-22); a whole checkpoint would be 207 MB more
    small = save("small", dtype=torch.bfloat16)[1]
    assert _peak_above_start(code, *sources, tmp_path / "out", small) < 65


def _sparse_checkpoint(directory: Path, config, parameters):
    header, offset = {}, 0
    for name, p in parameters.items():
        end = offset + 2 * p.numel()
        header[name] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    directory.mkdir()
    config.save_pretrained(directory)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
