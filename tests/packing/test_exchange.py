"""Documents change ranks over gloo: three processes, and two of them as a group."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from apical.packing import Cost, plan

RANKS = 3
# lengths on each rank: one rank has none, one has a document without tokens
LENGTHS = [[7, 1, 30, 2], [], [12, 0, 5]]
WORKER = """
import json, sys
import torch.distributed as dist
from apical.packing import Cost, exchange

rank, ranks, store, lengths = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
# a token says which rank, document and place it comes from
mine = [
    [rank * 10000 + number * 100 + place for place in range(length)]
    for number, length in enumerate(json.loads(lengths)[rank])
]
pair = dist.new_group([0, 2])
results = {
    "cost": exchange(mine),
    "squares": exchange(mine, cost=Cost(0, 1), equal_counts=False),
    "columns": exchange(mine, method="columns"),
    "none": exchange([]),
}
if rank != 1:
    results["pair"] = exchange(mine, group=pair)
print(json.dumps({name: [d.tolist() for d in documents] for name, documents in results.items()}))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[list[int]]]]:
    """Return what each of the ranks got, by the name of the exchange."""
    store = tmp_path_factory.mktemp("store") / "store"
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(RANKS), str(store), json.dumps(LENGTHS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors
    return [json.loads(out) for out, _ in outputs]


def tokens(ranks: list[int]) -> list[list[int]]:
    """Return all documents of some ranks, in the order that a plan numbers them."""
    return [
        [rank * 10000 + number * 100 + place for place in range(length)]
        for rank in ranks
        for number, length in enumerate(LENGTHS[rank])
    ]


@pytest.mark.parametrize(
    ("name", "ranks", "options"),
    [
        ("cost", [0, 1, 2], {}),
        ("squares", [0, 1, 2], {"cost": Cost(0, 1), "equal_counts": False}),
        ("columns", [0, 1, 2], {"method": "columns"}),
        ("pair", [0, 2], {}),
    ],
)
def test_every_rank_gets_its_part_of_the_plan(results, name, ranks, options):
    documents = tokens(ranks)
    assigned = plan([len(document) for document in documents], len(ranks), **options)
    for rank, numbers in zip(ranks, assigned, strict=True):
        assert results[rank][name] == [documents[n] for n in numbers]


def test_nothing_to_exchange_is_fine(results):
    assert [result["none"] for result in results] == [[], [], []]


def test_the_worker_uses_this_checkout():
    import apical.packing

    assert Path(apical.packing.__file__).is_relative_to(Path(__file__).parents[2])
