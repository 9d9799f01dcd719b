"""The command line: what it takes, what it calls, what it prints and how it ends."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import apical.growth.shards
import apical.growth.train.run
from apical import cli, commands
from apical.growth.operators import OPERATORS, ZeroDepth
from apical.growth.sparse import RULES, replaced

DEMO = str(Path(__file__).parents[1] / "recipes" / "demo.yaml")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Take back what the command line sets for the whole process."""
    for name in cli._QUIET:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def help_of(capsys) -> Callable[..., str]:
    def _help(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main([*words, "--help"])
        assert end.value.code == 0
        return capsys.readouterr().out

    return _help


def test_help_names_every_command(help_of):
    names = ("train", "grow", "sparsify", "export-dense", "info", "bench", "--debug")
    assert all(name in help_of() for name in names)


# a word of each argument and option that the command promises
PROMISED = {
    "train": ["RECIPE", "--set", "--resume", "--output", "--compare"],
    "grow": ["SRC", "OUT", "--max-shard-gb", *OPERATORS],
    "sparsify": ["SRC", "OUT", "--max-shard-gb", *(name.replace("_", "-") for name in RULES)],
    "export-dense": ["SRC", "OUT", "--max-shard-gb"],
    "info": ["--json"],
    "bench": ["OP", "--quick"],
}


@pytest.mark.parametrize(("command", "words"), PROMISED.items(), ids=PROMISED)
def test_help_names_every_option(help_of, command, words):
    text = help_of(command)
    assert [word for word in [*words, "--debug"] if word not in text] == []


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operators_options_are_the_fields_of_its_dataclass(help_of, operator):
    text = help_of("grow", "a", "b", operator)
    fields = (name.replace("_", "-") for name in OPERATORS[operator].__dataclass_fields__)
    assert [name for name in fields if f"--{name}" not in text] == []


@pytest.mark.parametrize("rule", RULES)
def test_a_rules_options_are_the_fields_of_its_dataclass(help_of, rule):
    text = help_of("sparsify", "a", "b", rule.replace("_", "-"))
    fields = (name.replace("_", "-") for name in RULES[rule].__dataclass_fields__)
    assert [name for name in fields if f"--{name}" not in text] == []


def test_no_argument_is_a_call_for_help(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 0
    assert "usage: apical" in capsys.readouterr().out


def test_the_installed_command_and_the_module_are_the_same():
    (installed,) = entry_points(group="console_scripts", name="apical")
    assert installed.load() is cli.main
    ran = subprocess.run(
        [sys.executable, "-m", "apical", "--version"], capture_output=True, text=True, check=True
    )
    assert ran.stdout == f"apical {apical.__version__}\n"


def test_help_does_not_wait_for_what_training_imports():
    code = (
        "import sys; from apical.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tyro" in ran.stderr.split()
    slow = {"torch", "transformers", "datasets", "safetensors", "pydantic", "matplotlib"}
    assert slow & set(ran.stderr.split()) == set()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        pytest.param(["trian", DEMO], "train", id="command"),
        pytest.param(["train", DEMO, "--resum"], "--resume", id="option"),
        pytest.param(["train"], "RECIPE", id="missing argument"),
        pytest.param(["grow", "a", "b", "stak"], "stack", id="operator"),
        pytest.param(["grow", "a", "b", "stack", "--factor", "1"], "above 1", id="bad option"),
        pytest.param(["sparsify", "a", "b", "low-rnk"], "low-rank", id="rule"),
        pytest.param(["sparsify", "a", "b", "low-rank", "--init", "x"], "cola", id="rule's option"),
        pytest.param(["train", DEMO, "--compare", "x"], "scratch", id="choice"),
    ],
)
def test_arguments_that_are_not_understood(capsys, arguments, hint):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert hint in captured.err
    assert captured.out == ""


@pytest.fixture
def trained(monkeypatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        apical.growth.train.run, "train", lambda recipe, **rest: calls.append({"": recipe, **rest})
    )
    return calls


def test_train_passes_on_what_was_asked(trained):
    sets = ["--set", "seed=3", "--set", "pretrain.tokens=5e3"]
    options = ["--resume", "--output", "there", "--compare", "scratch"]
    assert cli.main(["train", DEMO, *sets, *options]) == 0
    (call,) = trained
    recipe = call.pop("")
    assert (recipe.seed, recipe.stages[0].tokens) == (3, 5000)
    assert call == {"output": Path("there"), "resume": True, "compare": "scratch"}


def test_train_by_default(trained):
    assert cli.main(["train", DEMO]) == 0
    (call,) = trained
    assert call.pop("").smoke is False
    assert call == {"output": None, "resume": False, "compare": None}


def test_grow_writes_a_model_that_loads(checkpoint, tmp_path, capsys):
    out = tmp_path / "large"
    options = ["--factor", "3", "--max-shard-gb", "2e-6"]
    assert cli.main(["grow", str(checkpoint), str(out), "stack", *options]) == 0
    captured = capsys.readouterr()
    assert "stack(factor=3): llama, 6 layers from 2" in captured.out
    assert captured.out.endswith(f"wrote {out}\n")
    assert len(list(out.glob("*.safetensors"))) > 1
    old, new = (AutoModelForCausalLM.from_pretrained(path) for path in (checkpoint, out))
    assert new.config.num_hidden_layers == 6
    for name, weight in old.model.layers[1].named_parameters():
        assert torch.equal(new.model.layers[5].get_parameter(name), weight)


def test_grow_passes_on_what_was_asked(checkpoint, monkeypatch, capsys):
    calls: list[tuple[Any, ...]] = []

    def record(*args: Any, **options: Any) -> str:
        calls.append((*args, options))
        return "the plan"

    monkeypatch.setattr(apical.growth.shards, "grow_checkpoint", record)
    assert cli.main(["grow", str(checkpoint), "out", "zero-depth", "--max-shard-gb", "1.5"]) == 0
    expected = {"max_shard_bytes": 1_500_000_000, "progress": True}
    assert calls == [(checkpoint, Path("out"), ZeroDepth(), expected)]
    assert capsys.readouterr().out == "the plan\nwrote out\n"


def test_sparsify_and_back(checkpoint, tmp_path, capsys):
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    (checkpoint / "tokenizer_config.json").write_text("{}")
    options = ["--rank", "2", "--density", "0.25", "--include", "*.mlp.*", "--seed", "3"]
    assert cli.main(["sparsify", str(checkpoint), str(sparse), "sparse-low-rank", *options]) == 0
    said = capsys.readouterr().out
    assert "SparseLowRank(include=('*.mlp.*',)" in said
    assert "6 layers" in said
    assert said.endswith(f"wrote {sparse}\n")
    model = apical.load(sparse)
    assert len(replaced(model)) == 6
    assert (sparse / "tokenizer_config.json").is_file()
    arguments = [str(sparse), str(dense), "--max-shard-gb", "2e-6"]
    assert cli.main(["export-dense", *arguments]) == 0
    assert capsys.readouterr().out == f"6 layers are dense again\nwrote {dense}\n"
    weights = AutoModelForCausalLM.from_pretrained(dense).state_dict()
    for name, weight in apical.export_dense(model).state_dict().items():
        assert torch.equal(weights[name], weight)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sparsify", "SRC", "SRC", "low-rank"], "exists and is not overwritten"),
        (["sparsify", "nowhere", "out", "low-rank"], "SRC is nowhere, which is not a directory"),
        (["sparsify", "SRC", "out", "low-rank", "--rank", "9"], "rank is 9; expected an integer"),
        (["sparsify", "SRC", "out", "low-rank", "--rank", "1.5"], "rank is 1.5; expected a share"),
        (["sparsify", "SRC", "out", "low-rank", "--include", "*.nope"], "matches no linear layer"),
        (["export-dense", "SRC", "out"], "no sparse layers to export"),
        (["export-dense", "SRC", "out", "--max-shard-gb", "nan"], "--max-shard-gb is nan"),
    ],
    ids=["exists", "missing", "rank", "share", "pattern", "dense", "size"],
)
def test_mistakes_about_sparse_layers_are_one_line(
    checkpoint, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    words = [str(checkpoint) if word == "SRC" else word for word in words]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("apical: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_info_for_people_and_for_programs(capsys):
    assert cli.main(["info"]) == 0
    assert f"apical {' ' * 15}{apical.__version__}" in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["apical"] == apical.__version__


def test_bench_runs_the_repositorys_and_ends_as_it_ends(monkeypatch, tmp_path, capfd):
    script = tmp_path / "run.py"
    script.write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    monkeypatch.setattr(commands, "_BENCH", script)
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "all", "--quick"])
    assert end.value.code == 3
    assert capfd.readouterr().out == "['all', '--quick']\n"


def test_an_interrupt_ends_with_130(monkeypatch, capsys):
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(apical.growth.train.run, "train", interrupt)
    assert cli.main(["train", DEMO]) == 130
    assert capsys.readouterr().err == "apical: interrupted\n"


def test_a_mistake_of_ours_is_not_dressed_as_the_users(monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(apical.growth.train.run, "train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train", DEMO])
