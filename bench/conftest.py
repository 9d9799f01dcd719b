"""The fixture `race`, and what makes `pytest bench --benchmark-only` find the cases."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# the benches also run as plain scripts, where python puts this folder on the path itself
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import report
from pytest_benchmark.fixture import BenchmarkFixture
from race import Lineup, Result
from run import add_options, session_of
from session import Session, operations

_WRITTEN = pytest.StashKey[list[Path]]()
_SHOWN = ("status", "reason", "limit", "error", "peak_bytes", "share")


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser.getgroup("apical benches").addoption)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    ours = file_path.parent == Path(__file__).parent and file_path.stem in operations()
    # a file named on the command line is collected by pytest itself
    if not ours or parent.session.isinitpath(file_path):
        return None
    return pytest.Module.from_parent(parent, path=file_path)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        assert metafunc.module is not None
        option = metafunc.config.option
        found = metafunc.module.cases(quick=option.quick, device=option.device)
        found = [case for case in found if option.match in case.name]
        metafunc.parametrize("case", found, ids=[case.name for case in found])


@pytest.fixture(scope="session")
def bench_session(pytestconfig: pytest.Config) -> Iterator[Session]:
    session = session_of(pytestconfig.option)
    yield session
    if pytestconfig.option.output:
        pytestconfig.stash[_WRITTEN] = session.write(pytestconfig.option.output)


@pytest.fixture(scope="module", autouse=True)
def _warm_up(bench_session: Session, request: pytest.FixtureRequest) -> None:
    bench_session.warm_up(request.module.cases(quick=True, device=bench_session.device))


@pytest.fixture
def race(
    bench_session: Session, benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> Callable[[Lineup], Result]:
    """Race a lineup; pytest-benchmark times ours once more and keeps the ratios in extra_info."""

    def run(lineup: Lineup) -> Result:
        callspec = getattr(request.node, "callspec", None)
        name = callspec.id if callspec else request.node.name
        result = bench_session.run(request.path.stem, name, lineup)
        print(f"\n{request.path.stem}: {name}", *report.lines(result), sep="\n  ")
        _keep(result, bench_session, benchmark)
        assert result.ours.status == "ok", f"ours is off by {result.ours.error:.2g}"
        return result

    return run


def _keep(result: Result, session: Session, benchmark: BenchmarkFixture) -> None:
    # its own times are for comparing commits; the race's are the ones to quote
    benchmark.pedantic(result.lineup.ours, rounds=3, iterations=1)
    for p in report.summary("", [result], {}, session.peaks)["cases"][0]["providers"]:
        benchmark.extra_info[p["name"]] = {key: p[key] for key in _SHOWN} | {
            "ratio": p["ratio"] and {key: p["ratio"][key] for key in ("median", "q1", "q3")}
        }


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for path in config.stash.get(_WRITTEN, []):
        terminalreporter.write_line(str(path))
