"""The commands, one dataclass each: its fields are what the command line takes."""

import dataclasses
import json
import subprocess
import sys
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Generic, Literal, TypeVar

import tyro
from tyro.conf import arg, subcommand

from .growth.operators import OPERATORS

if TYPE_CHECKING:
    from .growth.plan import Operator
else:
    # one subcommand per operator; its options are the fields of its dataclass
    Operator = reduce(or_, (Annotated[kind, subcommand(name)] for name, kind in OPERATORS.items()))

_BENCH = Path(__file__).resolve().parents[2] / "bench" / "run.py"
_STYLE = (
    tyro.conf.PositionalRequiredArgs,
    tyro.conf.OmitSubcommandPrefixes,
    tyro.conf.OmitArgPrefixes,
    tyro.conf.CascadeSubcommandArgs,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.UseAppendAction,
)


@dataclasses.dataclass(frozen=True)
class Train:
    """Train, grow and go on training as a recipe says.

    Args:
        recipe: a YAML file, for example recipes/demo.yaml
        set: change a key of the recipe, as in pretrain.tokens=1e6 or smoke=true
        resume: go on from the last checkpoint of the same run
        output: directory of the run; runs/<name> unless given
        compare: also train the final model from scratch, with the same FLOPs
    """

    recipe: Annotated[Path, arg(metavar="RECIPE")]
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE")] = ()
    resume: bool = False
    output: Annotated[Path | None, arg(metavar="DIR")] = None
    compare: Annotated[Literal["scratch"] | None, arg(metavar="scratch")] = None

    def run(self) -> str:
        from .growth.train.recipe import load_recipe

        recipe = load_recipe(self.recipe, self.set)
        # after the recipe: what it needs takes seconds to import
        from .growth.train.run import train

        # it reports while it runs, so nothing is left to say
        train(recipe, output=self.output, resume=self.resume, compare=self.compare)
        return ""


@dataclasses.dataclass(frozen=True)
class Grow:
    """Make a larger checkpoint directory out of a smaller one, in bounded memory.

    Args:
        source: transformers directory with safetensors
        out: directory to write; it must not exist
        operator: how to grow; `apical grow SRC OUT stack --help` lists its options
        max_shard_gb: largest file to write, in 10^9 bytes
    """

    source: Annotated[Path, arg(metavar="SRC")]
    out: Annotated[Path, arg(metavar="OUT")]
    operator: Operator
    max_shard_gb: Annotated[float, arg(metavar="GB")] = 5.0

    def run(self) -> str:
        size = shard_bytes(self.source, self.max_shard_gb)
        from .growth.shards import grow_checkpoint

        plan = grow_checkpoint(
            self.source, self.out, self.operator, max_shard_bytes=size, progress=True
        )
        return f"{plan}\nwrote {self.out}"


@dataclasses.dataclass(frozen=True)
class Sparsify:
    """Replace linear layers of a checkpoint directory by sparse or low-rank ones.

    The result loads with apical.load, not with transformers alone.

    Args:
        source: transformers directory
        out: directory to write; it must not exist
        max_shard_gb: largest file to write, in 10^9 bytes
    """

    source: Annotated[Path, arg(metavar="SRC")]
    out: Annotated[Path, arg(metavar="OUT")]
    max_shard_gb: Annotated[float, arg(metavar="GB")] = 5.0

    def run(self) -> str:
        # the one with a rule does
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ExportDense:
    """Write a directory with sparse layers as a stock one, which loads with transformers alone.

    Args:
        source: directory with sparse layers
        out: directory to write; it must not exist
        max_shard_gb: largest file to write, in 10^9 bytes
    """

    source: Annotated[Path, arg(metavar="SRC")]
    out: Annotated[Path, arg(metavar="OUT")]
    max_shard_gb: Annotated[float, arg(metavar="GB")] = 5.0

    def run(self) -> str:
        size = shard_bytes(self.source, self.max_shard_gb)
        from .growth.sparse.export import export_dense_checkpoint

        count = export_dense_checkpoint(self.source, self.out, max_shard_bytes=size, progress=True)
        return f"{count} layers are dense again\nwrote {self.out}"


@dataclasses.dataclass(frozen=True)
class Info:
    """Say which devices, versions and implementations are in use, and why.

    Args:
        json: print it for programs
    """

    json: bool = False

    def run(self) -> str:
        from .info import collect, format_info

        info = collect()
        return json.dumps(info, indent=2) if self.json else format_info(info)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Race an op against its peers and write bench/results; in a checkout of the repository.

    Args:
        op: name of a file in bench/, or all
        quick: few sizes and rounds
    """

    op: Annotated[str, arg(metavar="OP")]
    quick: bool = False

    def run(self) -> str:
        if not _BENCH.is_file():
            raise ValueError(f"no {_BENCH}: benches live in the repository, run this in a checkout")
        command = [sys.executable, _BENCH, self.op, *(["--quick"] if self.quick else [])]
        raise SystemExit(subprocess.run(command, check=False).returncode)


def shard_bytes(source: Path, max_shard_gb: float) -> int:
    """Return the size of a file, and check it and the directory to read."""
    if not source.is_dir():
        raise ValueError(
            f"SRC is {source}, which is not a directory; only local checkpoint "
            "directories are supported, names on a hub are not fetched"
        )
    # also false for nan
    if not 1 <= max_shard_gb * 1e9 < float("inf"):
        raise ValueError(f"--max-shard-gb is {max_shard_gb:g}, expected a positive number")
    return int(max_shard_gb * 1e9)


Rules = TypeVar("Rules", bound=Sparsify)


@dataclasses.dataclass(frozen=True)
class _Line(Generic[Rules]):
    """Cheaper pre-training by reusing what is already trained.

    `apical COMMAND --help` explains a command; `apical --version` prints the version.

    Args:
        debug: show where an error comes from
    """

    command: (
        Annotated[Train, subcommand("train")]
        | Annotated[Grow, subcommand("grow")]
        | Annotated[Rules, subcommand("sparsify")]
        | Annotated[ExportDense, subcommand("export-dense")]
        | Annotated[Info, subcommand("info")]
        | Annotated[Bench, subcommand("bench")]
    )
    debug: bool = False


def run(arguments: list[str]) -> str:
    """Run the command that the arguments name, and return what it has to say."""
    rules, style = Sparsify, _STYLE
    if "sparsify" in arguments:
        # they need torch, which takes a second to import: not for the help of the other commands
        from .rule_commands import SparsifyBy

        rules = SparsifyBy
        # an option that is a list or None cannot be given several times
        style = tuple(marker for marker in _STYLE if marker is not tyro.conf.UseAppendAction)
    return tyro.cli(_Line[rules], prog="apical", args=arguments, config=style).command.run()
