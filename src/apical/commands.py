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
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE"), tyro.conf.UseAppendAction] = ()
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

    After a kill, the same command goes on with the files that were not finished.

    Args:
        source: transformers directory with safetensors, name of a model on the hub, or GGUF file
        out: directory to write; it must not exist
        operator: how to grow; `apical grow SRC OUT stack --help` lists its options
        plan: do what a plan.yaml says, which another growth has written, instead of an operator
        verify: compare old and new model on the first 512 tokens of a text; loads them whole
        max_shard_gb: largest file to write, in 10^9 bytes
    """

    source: Annotated[Path, arg(metavar="SRC")]
    out: Annotated[Path, arg(metavar="OUT")]
    operator: Operator | Annotated[None, subcommand("as-planned")] = None
    plan: Annotated[Path | None, arg(metavar="YAML")] = None
    verify: Annotated[Path | None, arg(metavar="TEXTFILE")] = None
    max_shard_gb: Annotated[float, arg(metavar="GB")] = 5.0

    def run(self) -> str:
        if (self.operator is None) == (self.plan is None):
            given = "both given" if self.plan else "missing"
            raise ValueError(f"operator and --plan are {given}; expected one, such as stack")
        size = file_bytes(self.max_shard_gb)
        from .growth.saved_plan import SavedPlan
        from .growth.shards import grow_checkpoint

        probe = None
        if self.verify:
            from .growth.verify import Probe

            probe = Probe(self.source, self.verify)
        operator = self.operator or SavedPlan(str(self.plan))
        plan = grow_checkpoint(self.source, self.out, operator, max_shard_bytes=size, progress=True)
        verdict = f"\n{probe.compare(self.out, plan)}" if probe else ""
        return f"{plan}{verdict}\nwrote {self.out}"


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
class PlanGrowth:
    """Say after how many tokens to stack a model's layers, and what that saves.

    By the law of Stacking Your Transformers (arXiv 2405.15319), for one of --tokens and --flops.

    Args:
        params: N, parameters of the grown model (required)
        tokens: D, that the run sees in all
        flops: C = 6 N D, of training the grown model from scratch
        factor: how many times deeper it is than the small one
        small_params: of the small model; N / factor unless given
    """

    params: float | None = None
    tokens: float | None = None
    flops: float | None = None
    factor: int = 4
    small_params: float | None = None

    def run(self) -> str:
        if self.params is None:
            raise ValueError("--params is missing; expected the grown model's, such as 7e9")
        from .growth.growth_law import plan_growth

        return str(plan_growth(**dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Laws and budgets: what to do with the compute there is.

    Args:
        law: what to plan
    """

    law: Annotated[PlanGrowth, subcommand("growth")] | Annotated[None, tyro.conf.Suppress]

    def run(self) -> str:
        assert self.law
        return self.law.run()


@dataclasses.dataclass(frozen=True)
class Merge:
    """Merge checkpoint directories of one architecture into another one, in bounded memory.

    Args:
        out: directory to write; it must not exist
        sources: transformers directories with safetensors, or names of models on the hub; of
            task-vectors the first is the base, of ema the last is the newest
        method: how; greedy-soup averages those that do not raise the loss on --text
        weights: one per SRC; of task-vectors the scales (one after the base, or one for all), of
            posterior the log-likelihoods of a text
        decay: of ema, in [0, 1)
        text: of greedy-soup: held-out text
        max_shard_gb: largest file to write, in 10^9 bytes
    """

    out: Annotated[Path, arg(metavar="OUT")]
    sources: Annotated[tuple[Path, ...], arg(metavar="SRC [SRC ...]"), tyro.conf.Positional]
    method: Literal["average", "linear", "ema", "task-vectors", "greedy-soup", "posterior"] = (
        "average"
    )
    weights: Annotated[tuple[float, ...], arg(metavar="W [W ...]")] = ()
    decay: float | None = None
    text: Annotated[Path | None, arg(metavar="FILE")] = None
    max_shard_gb: Annotated[float, arg(metavar="GB")] = 5.0

    def run(self) -> str:
        if not self.sources:
            raise ValueError("SRC is missing; expected one checkpoint directory or more after OUT")
        size = file_bytes(self.max_shard_gb)
        from .growth.merge import merge_checkpoints
        from .growth.merge.named import named

        method = named(self.method, weights=self.weights, decay=self.decay, text=self.text)
        shares = merge_checkpoints(
            self.sources, self.out, method, max_shard_bytes=size, progress=True
        )
        lines = [f"{share:>10.6g}  {src}" for share, src in zip(shares, self.sources, strict=True)]
        return "\n".join([*lines, f"wrote {self.out}"])


@dataclasses.dataclass(frozen=True)
class Info:
    """Say which devices, versions and implementations are in use, or what a checkpoint is.

    Args:
        checkpoint: transformers directory with safetensors, or name of a model on the hub
        json: print it for programs
    """

    checkpoint: Annotated[Path | None, arg(metavar="[SRC]"), tyro.conf.Positional] = None
    json: bool = False

    def run(self) -> str:
        if self.checkpoint is not None:
            from .growth.checkpoint_info import describe_checkpoint, format_checkpoint

            found = describe_checkpoint(self.checkpoint, OPERATORS)
            return json.dumps(found, indent=2) if self.json else format_checkpoint(found)
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
    return file_bytes(max_shard_gb)


def file_bytes(max_shard_gb: float) -> int:
    """Return the size of a file, and check it."""
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
        | Annotated[Plan, subcommand("plan")]
        | Annotated[Merge, subcommand("merge")]
        | Annotated[Info, subcommand("info")]
        | Annotated[Bench, subcommand("bench")]
    )
    debug: bool = False


def run(arguments: list[str]) -> str:
    """Run the command that the arguments name, and return what it has to say."""
    rules = Sparsify
    if "sparsify" in arguments:
        # they need torch, which takes a second to import: not for the help of the other commands
        from .rule_commands import SparsifyBy

        rules = SparsifyBy
    return tyro.cli(_Line[rules], prog="apical", args=arguments, config=_STYLE).command.run()
