"""The benches' own arithmetic, on clocks that tell what they are told, and a quick run of each."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
PEAKS = {"float32": 0.5, "bfloat16": 0.25, "copy_gb": 10.0}
FACTS = {
    "date": "2026-01-02",
    "device": "Intel(R) Xeon(R) Processor",
    "device_kind": "cpu",
    "cpu": "Intel(R) Xeon(R) Processor",
    "isa": ["avx2"],
    "cores": 2,
    "threads": 1,
    "load_start": 0.1,
    "load_end": 0.2,
    "versions": {"python": "3.12", "torch": "2.13.0"},
    "extension": "_C.abi3.so",
    "commit": "0123456789abcdef",
    "dirty": False,
    "quick": False,
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the benches' modules, which import each other as scripts do."""
    monkeypatch.syspath_prepend(BENCH)
    names = ("race", "report", "measure", "machine", "session", "run")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


class FakeMeter:
    """Calls are functions that return their name's output; times are read from lists."""

    def __init__(self, **seconds: list[float]) -> None:
        self.times = {name: iter(values) for name, values in seconds.items()}
        self.order: list[str] = []

    def seconds(self, call: Any) -> float:
        self.order.append(call.name)
        return next(self.times[call.name])

    def weigh(self, call: Any) -> tuple[tuple[torch.Tensor, ...], float, int]:
        return call(), self.seconds(call), 1000


class Provider:
    def __init__(self, name: str, *outputs: torch.Tensor | BaseException) -> None:
        self.name, self.calls = name, 0
        self.outputs = outputs or (torch.ones(3),)

    def __call__(self) -> Any:
        self.calls += 1
        if isinstance(self.outputs[0], BaseException):
            raise self.outputs[0]
        return self.outputs


def run_race(bench: SimpleNamespace, meter: FakeMeter, peers: dict, **options: Any) -> Any:
    settings = bench.race.Settings(**options.pop("settings", {"rounds": 3}))
    ours = options.pop("ours", Provider("ours"))
    lineup = bench.race.Lineup(ours=ours, peers=peers, **options)
    return bench.race.race("case", lineup, meter=meter, settings=settings)


def test_the_ratio_is_the_median_of_pairs(bench: SimpleNamespace):
    # the first time of each is the first call's, which does not count;
    # the ratio of the medians would be 4 / 2
    meter = FakeMeter(ours=[9, 1, 2, 4], peer=[1, 4, 2, 4])
    result = run_race(bench, meter, {"peer": Provider("peer")})
    ours, peer = result.entrants
    assert peer.ratios == [4, 1, 1]
    assert bench.race.quartiles(peer.ratios) == (1, 1, 2.5)
    assert ours.seconds == [1, 2, 4]
    assert ours.ratios == [1, 1, 1]


def test_rounds_take_turns_in_beginning(bench: SimpleNamespace):
    meter = FakeMeter(ours=[1] * 4, a=[1] * 4, b=[1] * 4)
    run_race(bench, meter, {"a": Provider("a"), "b": Provider("b")})
    rounds = [meter.order[i : i + 3] for i in range(0, 12, 3)]
    assert rounds[1:] == [["ours", "a", "b"], ["a", "b", "ours"], ["b", "ours", "a"]]


@pytest.mark.parametrize(
    ("budget", "rounds"),
    [(0.5, 2), (5.0, 4), (99.0, 6)],
    ids=["spent at once: the least", "spent in the third round", "never spent: the most"],
)
def test_rounds_end_with_the_budget(bench: SimpleNamespace, budget: float, rounds: int):
    meter = FakeMeter(ours=[1] * 9, peer=[0.5] * 9)
    settings = {"rounds": 6, "min_rounds": 2, "budget_s": budget}
    result = run_race(bench, meter, {"peer": Provider("peer")}, settings=settings)
    assert [len(entrant.seconds) for entrant in result.entrants] == [rounds, rounds]


def test_a_slow_peer_is_called_once(bench: SimpleNamespace):
    meter, slow = FakeMeter(ours=[1, 1, 2, 3], slow=[8]), Provider("slow")
    result = run_race(bench, meter, {"slow": slow}, settings={"rounds": 3, "slow_s": 5})
    assert slow.calls == 1
    assert result.entrants[1].ratios == [8 / 2]


def test_a_hopeless_peer_is_not_called_but_listed(bench: SimpleNamespace):
    hopeless = Provider("hopeless")
    peers = {"hopeless": bench.race.Peer(hopeless, expected=40)}
    settings = {"rounds": 1, "limit_s": 30}
    entrant = run_race(bench, FakeMeter(ours=[1, 1]), peers, settings=settings).entrants[1]
    assert hopeless.calls == 0
    assert entrant.status == "not run"
    assert "40 times" in entrant.reason
    assert "30 s" in entrant.reason


def test_a_compiled_peer_warms_up(bench: SimpleNamespace):
    compiled = Provider("compiled")
    peers = {"compiled": bench.race.Peer(compiled, compiled=True)}
    run_race(bench, FakeMeter(ours=[1, 1], compiled=[1, 1]), peers, settings={"rounds": 1})
    assert compiled.calls == 2  # the fake clock calls only where outputs are wanted


@pytest.mark.parametrize(
    ("output", "status"),
    [
        (torch.ones(3) * (1 + 1e-6), "ok"),
        (torch.ones(3) * 1.01, "wrong"),
        (torch.tensor([1.0, 1.0, float("nan")]), "wrong"),
        (torch.ones(4), "wrong"),
    ],
    ids=["rounding", "off by a percent", "nan", "another shape"],
)
def test_outputs_are_compared(bench: SimpleNamespace, output: torch.Tensor, status: str):
    meter = FakeMeter(ours=[1] * 4, peer=[1] * 4)
    result = run_race(bench, meter, {"peer": Provider("peer", output)})
    assert result.entrants[1].status == status
    # marked, not dropped
    assert result.entrants[1].ratios == [1, 1, 1]


def test_the_worst_of_several_outputs_counts(bench: SimpleNamespace):
    good, bad = torch.ones(2), torch.tensor([2.0, 0.0])
    assert bench.race.disagreement((good, bad), (good, good)) == pytest.approx(1)


def test_ours_is_held_against_the_truth(bench: SimpleNamespace):
    meter = FakeMeter(ours=[1] * 2, peer=[1] * 2)
    result = run_race(
        bench,
        meter,
        {"peer": Provider("peer", torch.full((3,), 2.0))},
        truth=lambda: (torch.full((3,), 2.0, dtype=torch.float64),),
        settings={"rounds": 1},
    )
    assert [entrant.status for entrant in result.entrants] == ["wrong", "ok"]


def test_a_limit_is_not_compared_and_a_layout_is_undone(bench: SimpleNamespace):
    far = torch.ones(1, 3)
    peers = {
        "limit": bench.race.Peer(Provider("limit", far * 9), limit=True),
        "other": bench.race.Peer(Provider("other", far), unpack=lambda out: (out[0][0],)),
    }
    meter = FakeMeter(ours=[1, 1], limit=[1, 1], other=[1, 1])
    _, limit, other = run_race(bench, meter, peers, settings={"rounds": 1}).entrants
    assert (limit.status, limit.error) == ("ok", None)
    assert (other.status, other.error) == ("ok", 0)


def test_a_peer_that_refuses_is_listed_with_one_line(bench: SimpleNamespace):
    error = NotImplementedError("no backward on CPU. Use a GPU.\nstack of\nmany lines")
    peers = {
        "refuses": Provider("refuses", error),
        "absent": bench.race.Peer(reason="not installed"),
    }
    entrants = run_race(bench, FakeMeter(ours=[1] * 4), peers).entrants
    assert [entrant.status for entrant in entrants] == ["ok", "not run", "not run"]
    assert entrants[1].reason == "NotImplementedError: no backward on CPU"
    assert entrants[2].reason == "not installed"


def test_ours_must_run(bench: SimpleNamespace):
    ours = Provider("ours", ValueError("bad shape"))
    with pytest.raises(RuntimeError, match="ours cannot run: ValueError: bad shape"):
        run_race(bench, FakeMeter(), {}, ours=ours)


def test_a_mistake_in_a_bench_is_not_a_refusal(bench: SimpleNamespace):
    peers = {"peer": Provider("peer", KeyError("typo"))}
    with pytest.raises(KeyError):
        run_race(bench, FakeMeter(ours=[1]), peers)


def test_a_real_clock_sees_a_known_ratio(bench: SimpleNamespace):
    def nap(seconds: float):
        def call() -> tuple[torch.Tensor, ...]:
            time.sleep(seconds)
            return (torch.ones(1),)

        return call

    lineup = bench.race.Lineup(ours=nap(0.02), peers={"peer": nap(0.06)})
    settings = bench.race.Settings(rounds=9)
    result = bench.race.race("naps", lineup, meter=bench.measure.CpuMeter(), settings=settings)
    # a busy machine only ever adds to a nap
    assert 1.5 < bench.race.quartiles(result.entrants[1].ratios)[1] < 4


def test_memory_is_the_growth_at_the_peak(bench: SimpleNamespace):
    megabytes = 1 << 20
    meter = bench.measure.CpuMeter()
    # an earlier, higher peak must not hide the growth
    torch.ones(200 * megabytes // 4).sum()

    def call() -> tuple[torch.Tensor, ...]:
        scratch = torch.ones(64 * megabytes // 4)
        return (scratch[:10].clone(),)

    _, _, peak = meter.weigh(call)
    if peak is None:
        pytest.skip("this kernel does not let a process reset its peak")
    assert 60 * megabytes < peak < 80 * megabytes


@pytest.fixture
def result(bench: SimpleNamespace) -> Any:
    """Return a race with one entrant of every kind."""
    far = torch.full((3,), 9.0)
    peers = {
        "quick peer": Provider("quick"),
        "wrong peer": Provider("wrong", far),
        "floor": bench.race.Peer(Provider("floor", far), limit=True),
        "absent | peer": bench.race.Peer(reason="not installed"),
        "slow peer": Provider("slow"),
    }
    meter = FakeMeter(ours=[2] * 4, quick=[4] * 4, wrong=[1] * 4, floor=[1] * 4, slow=[50])
    settings = {"rounds": 3, "slow_s": 10, "limit_s": 10, "budget_s": 99}
    # 0.2 TFLOP/s and 4 GB/s for ours
    work = {"flops": 0.4e12, "bytes": 8e9}
    return run_race(bench, meter, peers, what="A case.", settings=settings, **work)


def test_rates_and_shares(bench: SimpleNamespace, result: Any):
    data = bench.report.summary("op", [result], FACTS, PEAKS)
    ours, quick = data["cases"][0]["providers"][:2]
    assert ours["tflops"] == pytest.approx(0.2)
    assert ours["gbps"] == pytest.approx(4)
    # of 0.5 TFLOP/s and 10 GB/s both are at 40 %
    assert ours["share"] == pytest.approx(0.4)
    assert quick["share"] == pytest.approx(0.2)
    assert quick["ratio"]["median"] == 2


def test_sixteen_bit_products_may_be_widened(bench: SimpleNamespace):
    assert bench.report.gemm_peak("bfloat16", PEAKS) == PEAKS["float32"]
    assert bench.report.gemm_peak("bfloat16", PEAKS | {"bfloat16": 7.0}) == 7.0


def test_the_files_say_everything(bench: SimpleNamespace, result: Any, tmp_path: Path):
    stem = tmp_path / "results" / f"op-{bench.machine.slug(FACTS)}-{FACTS['date']}"
    data = bench.report.summary("op", [result], FACTS, PEAKS)
    files = bench.report.write(data, stem)
    name = "op-intel-xeon-processor-2026-01-02"
    assert [file.name for file in files] == [f"{name}.json", f"{name}.md", f"{name}.svg"]
    assert json.loads(files[0].read_text()) == data
    assert files[1].read_text() == bench.report.markdown(data)
    picture = files[2].read_text()
    for entrant in result.entrants:
        assert entrant.name in picture
    for fact in ("0123456789ab", "Xeon", "2.13.0", "2026-01-02", "1 thread"):
        assert fact in picture
    for fact in ("0123456789ab", "Xeon", "2.13.0", "2026-01-02", "1 of 2 cores", "0.2 after"):
        assert fact in files[1].read_text()


def test_the_table_marks_what_is_not_a_plain_number(bench: SimpleNamespace, result: Any):
    table = bench.report.markdown(bench.report.summary("op", [result], FACTS, PEAKS))
    rows = {line.split(" | ")[0]: line for line in table.splitlines() if line.startswith("| ")}
    assert "| 2 (2–2) | 4000 (4000–4000) | 0.1 | 20% |" in rows["| quick peer"]
    assert "**wrong result**" in rows["| wrong peer"]
    assert "a limit, not a competitor" in rows["| floor"]
    assert "not run: not installed" in rows["| absent / peer"]
    assert "| 25 | 50000 |" in rows["| slow peer"]
    assert "called once" in rows["| slow peer"]
    # every row has as many cells as the head
    assert len({line.count("|") for line in rows.values()}) == 1


def test_torch_alone_still_gives_numbers(
    bench: SimpleNamespace, result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "chart", raising=False)
    data = bench.report.summary("op", [result], FACTS, PEAKS)
    files = bench.report.write(data, tmp_path / "op")
    assert [file.suffix for file in files] == [".json", ".md"]
    assert "matplotlib" in caplog.text


@pytest.mark.parametrize(
    ("facts", "slug"),
    [
        ({"device_kind": "cpu", "threads": 1}, "intel-xeon-processor"),
        ({"device_kind": "cpu", "threads": 2}, "intel-xeon-processor-2-threads"),
        ({"device_kind": "cuda", "device": "NVIDIA H200", "threads": 2}, "nvidia-h200"),
    ],
    ids=["one thread is the rule", "other counts are another device", "threads do not matter"],
)
def test_slug(bench: SimpleNamespace, facts: dict, slug: str):
    assert bench.machine.slug(FACTS | facts) == slug


def test_results_do_not_make_the_tree_dirty(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def dirty() -> bool:
        return bench.machine.facts("cpu", 1)["dirty"]

    monkeypatch.setattr(bench.machine, "ROOT", tmp_path)
    assert bench.machine.facts("cpu", 1)["commit"] == "unknown"
    git("init")
    git("commit", "--allow-empty", "-m", "x")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "new.json").touch()
    assert not dirty()
    (tmp_path / "changed.py").touch()
    assert dirty()
    assert len(bench.machine.facts("cpu", 1)["commit"]) == 40


@pytest.fixture
def one_op(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Pretend that a bench named `one_op` exists; its test sets what ours returns."""
    module: Any = ModuleType("one_op")
    module.output = torch.ones(2)

    def cases(*, quick: bool, device: str) -> list:
        def build() -> Any:
            ours = Provider("ours", module.output)
            return bench.race.Lineup(ours=ours, peers={}, truth=lambda: (torch.ones(2),))

        return [bench.race.Case("case", build)]

    module.cases = cases
    monkeypatch.setitem(sys.modules, "one_op", module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("value", "code"), [(1.0, 0), (1.1, 1)], ids=["right", "wrong"])
def test_the_command_fails_if_ours_is_wrong(
    bench: SimpleNamespace, one_op: Any, tmp_path: Path, value: float, code: int
):
    one_op.output = torch.full((2,), value)
    options = bench.run._parser().parse_args(["all", "--quick", "--device=cpu"])
    options.output = tmp_path
    assert bench.run.run_plain(["one_op"], options) == code
    # the report is written either way
    assert len(list(tmp_path.glob("one_op-*.json"))) == 1


def command(*arguments: str | Path, tmp_path: Path) -> subprocess.CompletedProcess:
    # the outer pytest's variables would reach the inner one
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env["PYTEST_ADDOPTS"] = f"--benchmark-json={tmp_path / 'pytest-benchmark.json'}"
    return subprocess.run(
        [sys.executable, BENCH / "run.py", *arguments, "--quick", "--device=cpu"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def check_reports(folder: Path, op: str) -> None:
    (path,) = folder.glob(f"{op}-*.json")
    data = json.loads(path.read_text())
    assert data["quick"]
    assert {file.suffix for file in folder.glob(f"{op}-*")} == {".json", ".md", ".svg"}
    assert len(data["cases"]) >= 2
    raced = 0
    for case in data["cases"]:
        ours, *peers = case["providers"]
        assert ours["name"] == "ours"
        assert ours["status"] == "ok"
        # at this size nobody is wrong, and nobody is missing without a reason
        assert [peer["name"] for peer in peers if peer["status"] == "wrong"] == []
        assert [p["name"] for p in peers if p["status"] == "not run" and not p["reason"]] == []
        raced += sum(peer["ratio"] is not None for peer in peers)
    assert raced >= 10 if op != "packed_training" else raced >= 5


def test_quick_run_under_pytest_benchmark(tmp_path: Path):
    done = command("all", "--output", tmp_path / "reports", tmp_path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for op in ("linear_cross_entropy", "packed_training", "varlen_attention"):
        check_reports(tmp_path / "reports", op)
    found = json.loads((tmp_path / "pytest-benchmark.json").read_text())["benchmarks"]
    assert len(found) >= 7
    for benchmark in found:
        ratios = [info["ratio"] for info in benchmark["extra_info"].values()]
        assert sum(ratio is not None and ratio["median"] > 0 for ratio in ratios) >= 2


def test_quick_run_with_torch_alone(tmp_path: Path):
    done = command("linear_cross_entropy", "--plain", "--output", tmp_path, tmp_path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    check_reports(tmp_path, "linear_cross_entropy")


def test_only_a_full_run_is_a_result(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    folders = []
    monkeypatch.setattr(bench.run, "run_plain", lambda _, options: folders.append(options.output))
    for arguments in (["all", "--plain"], ["all", "--plain", "--quick"]):
        bench.run.main(arguments)
    full, quick = folders
    assert full == BENCH / "results"
    assert BENCH not in quick.parents
