"""Supports: drawn from a seed alone, the same bits everywhere, each kind with its balance."""

import copy
import hashlib
import math
import pickle
import re

import pytest
import torch

from apical import Support
from apical.kernels.sparse_low_rank._index import GroupIndex, positions
from apical.kernels.sparse_low_rank._permutation import permuted

# the shapes of the product's tests, and one whose sizes divide by everything
SHAPES = [(300, 52), (256, 128)]
DRAWN = {
    "uniform": 0.06,
    "regular": 0.1,
    "grouped": 0.4,
    "nm": 0.5,
}


def hash_of(support: Support) -> str:
    return hashlib.sha256(support.flat().numpy().tobytes()).hexdigest()[:16]


# what a checkpoint without positions relies on: these never change
GOLDEN = [
    (Support("uniform", 300, 52, 0.06, seed=1), "ef007944950695f7"),
    (Support("uniform", 2816, 1024, 0.03, seed=2**40 + 7), "8994f033fdc95734"),
    (Support("regular", 300, 52, 0.1, seed=1), "d5e811a5bf3e8933"),
    (Support("grouped", 300, 52, 0.4, seed=1), "2cc747fcbe9a6538"),
    (Support("grouped", 100, 40, 0.3, seed=2**63 - 1, block=(8, 4)), "0c36d90fe42c3fbf"),
    (Support("nm", 300, 52, 0.5, seed=1), "0bc25e73fc1b3370"),
    (Support("nm", 30, 16, 0.125, seed=1, block=(1, 8)), "70d417deec7366be"),
]


@pytest.mark.parametrize(("support", "expected"), GOLDEN, ids=str)
def test_a_seed_means_these_positions_for_ever(support, expected):
    assert hash_of(support) == expected


@pytest.mark.parametrize("kind", DRAWN)
def test_seeds_differ_and_nothing_else_is_drawn_from(kind):
    first = Support(kind, 300, 52, DRAWN[kind], seed=3)
    torch.manual_seed(1)
    again = Support(kind, 300, 52, DRAWN[kind], seed=3)
    assert torch.equal(first.flat(), again.flat())
    # seeds that share their low or their high word
    for seed in (4, 3 + 2**32):
        assert not torch.equal(first.flat(), Support(kind, 300, 52, DRAWN[kind], seed=seed).flat())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", DRAWN)
def test_positions_are_distinct_within_reach_and_as_many_as_stored(kind, shape):
    support = Support(kind, shape[0], shape[1], DRAWN[kind])
    flat = support.flat()
    assert flat.dtype == torch.int64
    assert len(flat) == support.stored == len(flat.unique())
    assert flat.min() >= 0
    assert flat.max() < math.prod(shape)
    assert support.mask().flatten().nonzero().flatten().equal(flat.sort().values)
    if kind != "grouped":
        assert torch.equal(flat, flat.sort().values)


def test_uniform_stores_as_many_as_sltrain():
    assert Support("uniform", 1376, 512, 0.03).stored == int(0.03 * 1376 * 512)
    assert Support("uniform", 7, 3, 1.0).flat().tolist() == list(range(21))


def test_uniform_has_no_preference():
    # each of 64 entries is stored in 32 of 128 supports on average: binomial, 4.9 its deviation
    masks = [Support("uniform", 8, 8, 0.25, seed=s).mask().flatten() for s in range(128)]
    stored = torch.stack(masks).double()
    counts = stored.sum(0)
    assert counts.min() > 32 - 4.5 * 4.9
    assert counts.max() < 32 + 4.5 * 4.9
    # and two entries together in 128 * (16 * 15) / (64 * 63) = 7.6
    pairs = stored.t() @ stored
    off = pairs[~torch.eye(64, dtype=torch.bool)]
    assert off.mean().item() == pytest.approx(128 * 16 * 15 / 64 / 63)
    assert 4.5 < off.var() < 10


# decks that hands divide evenly, and that they do not; one entry per row; half of them and more;
# all of them; fewer rows than one deck has hands
@pytest.mark.parametrize(
    ("shape", "density"),
    [((256, 128), 0.125), ((300, 52), 0.1), ((1024, 1024), 0.03), ((70, 52), 0.001),
     ((70, 53), 0.5), ((70, 53), 0.7), ((30, 20), 1.0), ((3, 100), 0.05), ((9, 1), 1.0)],
)  # fmt: skip
def test_regular_balances_rows_and_columns(shape, density):
    support = Support("regular", shape[0], shape[1], density)
    assert len(support.flat().unique()) == support.stored
    rows, columns = support.mask().sum(1), support.mask().sum(0)
    assert (rows == max(round(density * shape[1]), 1)).all()
    assert columns.max() - columns.min() <= 1


def test_grouped_blocks_are_whole_and_balanced():
    support = Support("grouped", 1000, 520, 0.1)
    mask = support.mask()
    found = support.index("cpu")
    assert isinstance(found, GroupIndex)
    assert mask[:, 512:].sum() == 0, "the columns after the last whole block stay empty"
    blocks = torch.stack([part.any(0) for part in mask[:, :512].split(128)])
    whole = torch.stack([part.all(0) for part in mask[:, :512].split(128)])
    assert torch.equal(blocks, whole)
    held = blocks.view(8, 32, 16)
    assert torch.equal(held.any(2), held.all(2))
    counts = held[:, :, 0].sum(0)
    assert counts.max() - counts.min() <= 1, "every column of blocks is dealt before one again"
    per_group = held[:, :, 0].sum(1)
    assert per_group.max() - per_group.min() <= 1
    assert torch.equal(found.group_starts.diff().long(), per_group)
    assert support.stored / 520_000 == pytest.approx(0.1, rel=0.05)


def test_values_of_a_block_go_down_its_columns():
    support = Support("grouped", 20, 12, 0.5, block=(8, 4))
    flat, found, first = support.flat(), support.index("cpu"), 0
    assert isinstance(found, GroupIndex)
    for group in range(3):
        rows = min(8, 20 - 8 * group)
        for chunk in found.chunks[found.group_starts[group] : found.group_starts[group + 1]]:
            part = flat[first : first + 4 * rows].view(4, rows)
            for column in range(4):
                expected = [(8 * group + r) * 12 + 4 * chunk.item() + column for r in range(rows)]
                assert part[column].tolist() == expected
            first += 4 * rows
    assert first == support.stored


@pytest.mark.parametrize("block", [(2, 4), (1, 4), (3, 5), (4, 4)])
def test_nm_keeps_n_of_every_m(block):
    few, many = block
    mask = Support("nm", 30, 4 * many, few / many, block=block).mask()
    assert (mask.view(30, 4, many).sum(2) == few).all()


def test_explicit_round_trip():
    drawn = torch.randperm(300 * 52)[:500]
    support = Support.explicit(drawn.int(), 300, 52)
    assert support.flat().equal(drawn.sort().values)
    assert (support.stored, support.kind) == (500, "explicit")
    assert support.density == 500 / (300 * 52)
    again = Support.explicit(support.flat(), 300, 52)
    assert again.mask().equal(support.mask())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [*DRAWN, "explicit", "thin"])
def test_the_index_says_what_the_positions_say(kind, shape):
    n, m = shape
    if kind == "explicit":
        support = Support.explicit(torch.randperm(n * m)[:700], n, m)
    elif kind == "thin":
        # rows of blocks without a block, and a cut last one
        support = Support("grouped", n, m, 0.1, block=(48, 16))
    else:
        support = Support(kind, n, m, DRAWN[kind])
    found, blocks = support.index("cpu"), support.kind == "grouped"
    assert all(part.dtype == torch.int32 for part in found)
    layout = [int(blocks), n, m, *support.block]
    assert positions(list(found), layout, support.stored).equal(support.flat())
    # by columns: the same entries, in the order of the columns, each with its place
    starts, owners, order = found[2:]
    column = torch.arange(len(starts) - 1).repeat_interleave(starts.diff())
    by_row = torch.arange(len(found[0]) - 1).repeat_interleave(found[0].diff())
    assert owners.equal(by_row[order.long()].int())
    assert column.int().equal(found[1][order.long()])


@pytest.mark.parametrize("kind", DRAWN)
def test_an_index_is_made_once_whatever_is_the_default_device_or_mode(kind):
    support = Support(kind, 256, 128, DRAWN[kind])
    with torch.inference_mode(), torch.device("meta"):
        found = support.index("cpu")
        flat = support.flat()
    assert support.index("cpu") is found
    assert all(part.device.type == "cpu" and not part.is_inference() for part in found)
    assert flat.equal(Support(kind, 256, 128, DRAWN[kind]).flat())
    elsewhere = [part.shape for part in support.index("meta")]
    # what goes by columns is read on the CPU alone; that of blocks is small
    kept = found if kind == "grouped" else (*found[:2], *[part[:0] for part in found[2:]])
    assert elsewhere == [part.shape for part in kept]


def test_a_copy_makes_its_index_again():
    support = Support("uniform", 300, 52, 0.06, seed=5)
    support.index("cpu")
    for other in (copy.deepcopy(support), pickle.loads(pickle.dumps(support))):
        assert not other._cache
        assert other.flat().equal(support.flat())
    assert support._cache


# 1 and 2: below the smallest network; a power of two; just above one; odd numbers of bits
@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 1000, 4097])
def test_a_permutation_permutes(size):
    arange = torch.arange(size)
    keys = [(0,), (1,), (2**32 - 1, 5)]
    drawn = [permuted(arange, size, *key) for key in keys]
    assert all(p.sort().values.equal(arange) for p in drawn)
    if size > 60:
        assert not drawn[0].equal(drawn[1])
    # any element, in any order: what is drawn does not depend on what else is drawn
    some = torch.randint(0, size, (50,))
    assert permuted(some, size, 1).equal(drawn[1][some])


def test_a_permutation_per_row():
    index = torch.arange(50).expand(20, 50)
    drawn = permuted(index, 50, 7, torch.arange(20)[:, None])
    for row in range(20):
        assert drawn[row].equal(permuted(index[0], 50, 7, row))


def test_permutations_have_no_preference():
    # 1000 permutations of 8: every element at every place 125 times, a deviation of 10.5
    arange = torch.arange(8)
    drawn = permuted(arange.expand(1000, 8), 8, 3, torch.arange(1000)[:, None])
    counts = torch.stack([(drawn == value).sum(0) for value in range(8)])
    assert counts.sub(125).abs().max() < 4.5 * 10.5


POSITIONS = torch.tensor([1, 5, 3])
REFUSED = [
    (lambda: Support("uniform", 0, 4, 0.5), "at least 1 x 1"),
    (lambda: Support("other", 4, 4, 0.5), "must be one of uniform, regular, grouped, nm"),  # type: ignore[arg-type]
    (lambda: Support("uniform", 4, 4, 0.5, seed=-1), "seed must be in"),
    (lambda: Support("uniform", 4, 4, 0.5, seed=2**63), "seed must be in"),
    (lambda: Support("uniform", 4, 4, 1.1), "density must be above 0 and at most 1"),
    (lambda: Support("uniform", 4, 4, math.nan), "density must be above 0 and at most 1"),
    (lambda: Support("uniform", 4, 4, 0.01), "stores no entry"),
    (lambda: Support("grouped", 200, 64, 0.001), "stores no entry"),
    (lambda: Support("grouped", 200, 8, 0.5), "at least a block's 16 columns"),
    (lambda: Support("grouped", 200, 64, 0.5, block=(0, 4)), "block must be"),
    (lambda: Support("nm", 4, 6, 0.5), "divisible by 4"),
    (lambda: Support("nm", 4, 8, 0.25), "has density 0.5"),
    (lambda: Support("nm", 4, 8, 0.5, block=(5, 4)), "0 < n <= m"),
    (lambda: Support("explicit", 4, 4, 0.5), "use Support.explicit"),
    (lambda: Support("uniform", 4, 4, 0.5, positions=POSITIONS), "use Support.explicit"),
    (lambda: Support.explicit(POSITIONS.float(), 4, 4), "int32 or int64"),
    (lambda: Support.explicit(POSITIONS[None], 4, 4), "must be (S,)"),
    (lambda: Support.explicit(POSITIONS[:0], 4, 4), "are empty"),
    (lambda: Support.explicit(POSITIONS + 12, 4, 4), "in 0 .. 15, found 17"),
    (lambda: Support.explicit(POSITIONS - 2, 4, 4), "in 0 .. 15, found -1"),
    (lambda: Support.explicit(POSITIONS.repeat(2), 4, 4), "must be distinct"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_no_support_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make()
    assert "\n" not in str(error.value)
