"""What users get wrong, through the command line: one line on stderr, exit code 2, no traceback."""

import json
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from apical import cli, commands
from apical.growth.train.data.tokenizer import train_tokenizer

RECIPE = """\
name: bad
tokenizer: {train_on: [mine], vocab_size: 300}
sources:
  mine: {files: ["TEXT"], validation: 0.2}
stages:
  - name: only
    model:
      from: scratch
      config: {model_type: llama, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1,
        num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 64}
    data: {mine: 1.0}
    tokens: 512
    batch_tokens: 128
    context: 64
    schedule: {kind: cosine, peak: 1e-3}
    evaluate_tokens: 128
"""
SENTENCES = [f"Sentence number {n} has {n % 7} small words.\n\n" for n in range(800)]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch) -> Path:
    """Work in an empty directory, and take back what the command line sets for the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("APICAL_CACHE", str(tmp_path / "cache"))
    for name in cli._QUIET:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "good.txt").write_text("".join(SENTENCES))
    (tmp_path / "r.yaml").write_text(RECIPE.replace("TEXT", "good.txt"))
    return tmp_path


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Run a command that must be refused; return the one line that says why."""

    def _refused(*arguments: str) -> str:
        capsys.readouterr()
        assert cli.main(arguments) == 2
        # what begins with a carriage return is a progress bar
        lines = [line for line in capsys.readouterr().err.split("\n") if line[:1] != "\r"]
        assert len(lines) == 2
        assert lines[0].startswith("apical: error: ")
        assert lines[1] == ""
        return lines[0].removeprefix("apical: error: ")

    return _refused


def test_the_recipe_is_good_but_for_what_the_tests_break(workplace, capsys):
    assert cli.main(["train", "r.yaml"]) == 0
    assert (workplace / "runs" / "bad" / "checkpoint" / "config.json").is_file()
    records = (workplace / "runs" / "bad" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(record) for record in records)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        pytest.param("no.txt", None, ["no such file", "no.txt"], id="missing"),
        pytest.param("no.txt", b"", ["no.txt", "is empty"], id="empty"),
        pytest.param("no.txt", b" \n\n", ["no.txt", "is empty"], id="blank"),
        pytest.param("no.txt", b"ab\x00\x01", ["no.txt", "is not text", "zero"], id="binary"),
        pytest.param("no.txt", b"ab\xff\xfe", ["no.txt", "is not text", "UTF-8"], id="latin"),
        pytest.param("no.jsonl", b'{"txt": 1}\n', ["no.jsonl:1", "text_field"], id="no field"),
        pytest.param("no.jsonl", b"{\n", ["no.jsonl:1", "not JSON"], id="broken lines"),
        pytest.param("no.pdf", b"%PDF", ["no.pdf", "unknown kind of file"], id="unknown kind"),
        pytest.param("no.parquet", b"abc", ["no.parquet", "not a Parquet"], id="not what it says"),
    ],
)
def test_text_that_cannot_be_read(workplace, refused, name, content, expected):
    if content is not None:
        (workplace / name).write_bytes(content)
    message = refused("train", "r.yaml", "--set", f"sources.mine.files=[{name}]")
    assert [part for part in expected if part not in message] == []
    # nothing was begun
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("only.model.config.model_type=lama", "unknown model type 'lama'; did you mean 'llama'?"),
        ("only.model.config.vocab_size=256", "vocab_size 256 is below the tokenizer's 300"),
        ("only.data.mine=0", "zero-token mixture"),
        ("only.tokens=0", "--set only.tokens: should be greater than 0, got 0"),
        ("only.context=65", "is 65, above the model's max_position_embeddings 64"),
        ("only.tokns=5", "--set only.tokns: unknown key; did you mean 'tokens'?"),
        ("only.sparsity=0.5", "unknown value 0.5; expected a rule such as"),
        ("only.model={from: org/name}", "names on a hub are not fetched"),
        ("tokenizer={path: nowhere}", "--set tokenizer.path: 'nowhere' is no directory"),
    ],
    ids=lambda value: value.partition("=")[0] if "=" in value else "",
)
def test_recipes_that_cannot_be_run(refused, override, expected):
    assert expected in refused("train", "r.yaml", "--set", override)


def test_the_line_of_a_mistake(workplace, refused):
    path = workplace / "r.yaml"
    path.write_text(path.read_text().replace("tokens: 512", "tokns: 512"))
    expected = "r.yaml:12: stages[0].tokns: unknown key; did you mean 'tokens'?"
    assert refused("train", "r.yaml") == expected
    assert refused("train", "s.yaml") == "s.yaml: no such recipe"


def test_a_tokenizer_larger_than_the_model(workplace, refused):
    tokenizer = train_tokenizer(SENTENCES, vocab_size=300, cache=workplace / "cache")
    tokenizer.save_pretrained(workplace / "tokenizer")
    sets = ["tokenizer={path: tokenizer}", f"only.model.config.vocab_size={len(tokenizer) - 1}"]
    message = refused("train", "r.yaml", *(f"--set={each}" for each in sets))
    assert f"vocab_size {len(tokenizer) - 1}" in message
    assert f"{len(tokenizer)} tokens" in message


def test_documents_longer_than_the_context_are_no_mistake(workplace):
    (workplace / "long.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} long lines " * 400}) + "\n" for n in range(40))
    )
    assert cli.main(["train", "r.yaml", "--set", "sources.mine.files=[long.jsonl]"]) == 0


def test_resuming_what_is_not_there_or_has_changed(refused):
    assert "runs/bad holds no run to resume" in refused("train", "r.yaml", "--resume")
    assert cli.main(["train", "r.yaml"]) == 0
    changed = refused("train", "r.yaml", "--resume", "--set", "only.tokens=1024")
    assert "stages[0].tokens: 512 -> 1024" in changed


def test_an_output_that_is_a_file(workplace, refused):
    message = refused("train", "r.yaml", "--output", "good.txt")
    assert "good.txt is a file" in message


@pytest.fixture
def checkpoint(workplace: Path) -> Path:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(workplace / "small")
    return workplace / "small"


def test_checkpoints_that_cannot_be_grown(workplace, checkpoint, refused):
    hub = refused("grow", "org/model", "out", "stack")
    assert "org/model is no directory here and could not be fetched from the hub" in hub
    assert "give the path of a checkpoint directory" in hub
    size = refused("grow", "small", "out", "stack", "--max-shard-gb", "0")
    assert size == "--max-shard-gb is 0, expected a positive number"
    assert "small exists and is not overwritten" in refused("grow", "small", "small", "stack")
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refused("grow", "small", "out", "stack")
    config = json.loads((checkpoint / "config.json").read_text()) | {"model_type": "mamba"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert "model_type 'mamba' has no table" in refused("grow", "small", "out", "stack")
    (checkpoint / "config.json").unlink()
    assert "small has no config.json" in refused("grow", "small", "out", "stack")
    assert not (workplace / "out").exists()


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Let no file grow beyond a number of bytes: the write fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_while_growing(workplace, checkpoint, refused):
    with small_files(20_000):
        message = refused("grow", "small", "out", "stack")
    assert "File too large" in message
    assert [path.name for path in workplace.glob("out*")] == []


def test_a_model_that_does_not_take_the_kernels_is_refused_before_the_run(workplace, refused):
    # a family with attention of its own, and a bias in the head
    config = "{model_type: gptj, n_embd: 8, n_layer: 1, n_head: 2, rotary_dim: 2}"
    message = refused("train", "r.yaml", "--set", f"only.model.config={config}")
    assert "stages[0].kernels" in message
    assert "write `kernels: false`" in message
    assert not (workplace / "runs").exists()


def test_a_checkpoint_that_does_not_fit_on_the_disk(workplace, refused, monkeypatch):
    # the text is in the cache already, so that the checkpoint is what does not fit
    assert cli.main(["train", "r.yaml"]) == 0
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 2000))
    message = refused("train", "r.yaml", "--output", "other")
    assert "has 2.0 kB free, the checkpoint needs" in message


def test_a_disk_that_is_known_to_be_too_small(checkpoint, refused, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    assert "has 0.0 kB free, the grown checkpoint needs" in refused("grow", "small", "out", "stack")


def test_a_disk_that_fills_up_while_training(workplace, refused):
    # the text is in the cache already, so that the checkpoint is what does not fit
    assert cli.main(["train", "r.yaml"]) == 0
    with small_files(10_000):
        message = refused("train", "r.yaml", "--output", "full")
    assert "File too large" in message
    assert not list((workplace / "full").glob("steps/step-*"))


@pytest.mark.parametrize(
    ("package", "arguments", "expected"),
    [
        pytest.param("tyro", ["info"], "needs the package tyro: pip install tyro", id="tyro"),
        pytest.param(
            "pydantic",
            ["train", "r.yaml"],
            "apical train needs the package pydantic: pip install 'apical[train]'",
            id="pydantic",
        ),
        pytest.param(
            "safetensors",
            ["grow", ".", "out", "stack"],
            "needs the package safetensors: pip install 'apical[hf]'",
            id="safetensors",
        ),
    ],
)
def test_a_package_that_is_not_installed(package, arguments, expected):
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from apical.cli import main; sys.exit(main({arguments!r}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert expected in ran.stderr


def test_a_package_that_is_met_in_the_middle_of_a_run(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refused("train", "r.yaml")
    assert message == "reading files needs the package datasets: pip install 'apical[train]'"


def test_benches_outside_of_the_repository(workplace, refused, monkeypatch):
    monkeypatch.setattr(commands, "_BENCH", workplace / "bench" / "run.py")
    assert "benches live in the repository" in refused("bench", "all")


# the flag may stand before the command or behind it
@pytest.mark.parametrize(
    "arguments", [["--debug", "train", "s.yaml"], ["train", "s.yaml", "--debug"]]
)
def test_debug_shows_where_it_happened(capsys, arguments):
    assert cli.main(arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert "read_document" in text
    assert text.endswith("apical: error: s.yaml: no such recipe\n")


def test_a_real_process_says_one_line_and_ends_with_2():
    ran = subprocess.run(
        [sys.executable, "-m", "apical", "train", "s.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "apical: error: s.yaml: no such recipe\n"
