"""`apical merge` and `apical info SRC`."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import apical
from apical import cli
from apical.growth.checkpoint_info import describe_checkpoint, format_checkpoint
from apical.growth.merge.text_loss import text_loss
from apical.growth.operators import OPERATORS

WORDS = [f"w{i}" for i in range(64)]
TEXT = " ".join(WORDS[(7 * i) % 64] for i in range(50))


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Take back what the command line sets for the whole process."""
    for name in cli._QUIET:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def three(save, tmp_path):
    """Three checkpoints with a tokenizer, which are like each other."""
    (first, _), *rest = [save(name) for name in "abc"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in "abc":
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / name)
    return [first, *(model for model, _ in rest)], [tmp_path / name for name in "abc"]


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ([], apical.Average()),
        (["--weights", "3", "1", "0.5"], apical.Average([3.0, 1.0, 0.5])),
        (["--method", "linear", "--weights", "2", "-1", "0.5"], apical.Linear([2.0, -1.0, 0.5])),
        (["--method", "ema", "--decay", "0.9"], apical.EMA(0.9)),
        (["--method", "task-vectors"], apical.TaskVectors(1.0)),
        (["--method", "task-vectors", "--weights", "-0.5"], apical.TaskVectors(-0.5)),
        (["--method", "task-vectors", "--weights", "1", "2"], apical.TaskVectors(scales=[1, 2])),
        (["--method", "posterior", "--weights", "-9", "-8", "-8"], apical.Posterior([-9, -8, -8])),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value),
)
def test_merge(three, tmp_path, weights_of, capsys, options, method):
    live, sources = three
    out = tmp_path / "out"
    assert cli.main(["merge", str(out), *map(str, sources), *options]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"wrote {out}"
    shares = method.coefficients(3)
    for line, share, source in zip(said, shares, sources, strict=False):
        assert line.split() == [f"{share:.6g}", str(source)]
    expected = apical.merge(live, method)
    for name, tensor in weights_of(out).items():
        assert torch.equal(tensor, expected.get_parameter(name)), name


def test_a_greedy_soup_by_the_loss_on_a_text(three, tmp_path, weights_of, capsys):
    live, sources = three
    (tmp_path / "held-out.txt").write_text(TEXT)
    out = tmp_path / "out"
    options = ["--method", "greedy-soup", "--text", str(tmp_path / "held-out.txt")]
    assert cli.main(["merge", str(out), *map(str, sources), *options]) == 0
    tokens = torch.tensor([[(7 * i) % 64 for i in range(50)]])

    def score(model):
        with torch.no_grad():
            return -model(input_ids=tokens, labels=tokens).loss.item()

    expected = apical.merge(live, apical.GreedySoup(score))
    for name, tensor in weights_of(out).items():
        assert torch.equal(tensor, expected.get_parameter(name)), name
    assert "100%" in capsys.readouterr().err
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize("window", [7, 50, 1024], ids=["8 windows", "one", "longer than the text"])
def test_the_loss_of_a_text_is_the_mean_over_what_is_predicted(three, tmp_path, window):
    live, sources = three
    (tmp_path / "text").write_text(TEXT)
    tokens = torch.tensor([(7 * i) % 64 for i in range(50)])
    with torch.no_grad():
        lost = [
            torch.nn.functional.cross_entropy(live[0](part[None]).logits[0, :-1], part[1:]) * n
            for part in tokens.split(window)
            if (n := len(part) - 1)
        ]
    count = sum(len(part) - 1 for part in tokens.split(window))
    found = text_loss(sources[0], tmp_path / "text", window=window)
    assert found == pytest.approx(torch.stack(lost).sum().item() / count, rel=1e-5)


def test_a_text_of_one_token_has_no_loss(three, tmp_path):
    (tmp_path / "text").write_text("w1")
    with pytest.raises(ValueError, match="has 1 tokens; expected a text of two or more"):
        text_loss(three[1][0], tmp_path / "text")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out"], "SRC is missing"),
        (["out", "a", "nowhere"], "nowhere is not a directory"),
        (["b", "a"], "b exists and is not overwritten"),
        (["out", "a", "b", "--method", "linear"], "--weights is missing; expected one with"),
        (["out", "a", "b", "--method", "ema"], "--decay is missing"),
        (["out", "a", "b", "--method", "greedy-soup"], "--text is missing"),
        (["out", "a", "--method", "greedy-soup", "--text", "x"], "x, which is not a file"),
        (["out", "a", "b", "--decay", "0.5"], "--decay does not belong to --method average"),
        (["out", "a", "b", "--weights", "1"], "weights has 1 numbers; expected 2"),
        (["out", "a", "b", "--max-shard-gb", "0"], "--max-shard-gb is 0"),
    ],
)
def test_mistakes_are_one_line(three, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["merge", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("apical: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_info_says_what_a_checkpoint_is(save, capsys, change):
    model, source = save("a")
    change(source, parts=3)
    assert cli.main(["info", str(source)]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line)
    count = sum(p.numel() for p in model.parameters())
    tensors = len(list(model.parameters()))
    assert rows["family"] == "llama"
    assert rows["layers"] == "3"
    assert rows["sizes"] == "hidden 32, ffn 48, heads 4, kv_heads 2, head_dim 8, vocab 64"
    assert rows["parameters"] == f"{count:,}"
    assert rows["embeddings"] == "tied"
    assert rows["tensors"] == f"{tensors}: {tensors} float32"
    assert rows["bytes"] == f"{4 * count:,} in 3 files"
    assert rows["accounted"] == f"every one of {tensors} tensors is one of a llama"
    assert rows["stack"].startswith("changes the function: ")
    assert rows["widen"] == "keeps the function"
    assert set(OPERATORS) < set(rows)


def test_info_for_programs_and_of_what_is_wrong(save, capsys, change, weights_of):
    _, source = save("a", "olmo2-post-norms", torch.bfloat16)
    tensors = weights_of(source)
    del tensors["model.norm.weight"]
    change(source, tensors | {"steps": torch.tensor([3])})
    assert cli.main(["info", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dtypes"] == {"bfloat16": len(tensors), "int64": 1}
    assert found["tied"] is False
    assert found["bytes"] == 2 * sum(math.prod(t.shape) for t in tensors.values()) + 8
    assert "1 unexpected: steps; 1 missing: model.norm.weight" in found["accounted"]


@dataclasses.dataclass(frozen=True)
class _Needs:
    size: int


@dataclasses.dataclass(frozen=True)
class _Refuses:
    def plan(self, config):
        raise ValueError("no layer of it can add nothing")


def test_info_of_operators_that_need_more_or_cannot(save):
    found = describe_checkpoint(save("a")[1], {"one": _Needs, "other": _Refuses})
    refused = "not with its defaults: no layer of it can add nothing"
    assert found["operators"] == {"one": "depends on size", "other": refused}


def test_info_of_a_model_without_its_head(save, change, weights_of):
    model, source = save("a", "llama-every-bias")
    bare = {
        n.removeprefix("model."): t for n, t in weights_of(source).items() if "lm_head" not in n
    }
    change(source, bare)
    found = describe_checkpoint(source, {})
    assert found["head"] is False
    assert found["parameters"] == sum(p.numel() for p in model.model.parameters())
    assert found["accounted"] == f"every one of {len(bare)} tensors is one of a llama"
    assert "llama, without its head" in format_checkpoint(found)


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere", "nowhere is not a directory"), ("empty", "empty has no config.json")],
)
def test_info_of_no_checkpoint(tmp_path, monkeypatch, capsys, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert cli.main(["info", source]) == 2
    assert message in capsys.readouterr().err


def test_a_merged_checkpoint_loads_with_plain_transformers(three, tmp_path):
    _, sources = three
    assert cli.main(["merge", str(tmp_path / "out"), *map(str, sources)]) == 0
    auto: Any = AutoModelForCausalLM
    loaded, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert loaded.generate(torch.tensor([[1, 5]]), **options).shape == (1, 5)
