"""Linear maps by their entries are held against dense matrices."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apical.growth.maps import LinearMap, SpaceMap, joined

# small numbers whose products float64 represents
_WEIGHTS = st.integers(-8, 8).map(lambda n: n / 4)
_SIZE = st.integers(1, 5)
_EITHER = st.booleans()


@st.composite
def maps(draw, new=_SIZE, old=_SIZE, select=_EITHER):
    """Selections with and without empty directions, and dense maps; also maps with no entry."""
    rows, columns = draw(new), draw(old)
    if draw(select):
        sources = draw(st.lists(st.integers(-1, columns - 1), min_size=rows, max_size=rows))
        weights = draw(st.lists(_WEIGHTS.filter(bool), min_size=rows, max_size=rows))
        return LinearMap.of(columns, sources, weights)
    entries = draw(st.lists(_WEIGHTS, min_size=rows * columns, max_size=rows * columns))
    return LinearMap.dense(torch.tensor(entries, dtype=torch.float64).view(rows, columns))


few = settings(max_examples=40, deadline=None)


@few
@given(st.data())
def test_products_of_maps_are_products_of_matrices(data):
    first = data.draw(maps())
    second = data.draw(maps(old=st.just(first.new)))
    product = second.after(first)
    assert torch.equal(product.matrix(), second.matrix() @ first.matrix())
    assert bool((product.row.diff() >= 0).all())  # sorted, as all maps are


@few
@given(maps(), maps())
def test_times_is_the_kronecker_product(slow, fast):
    product = slow.times(fast)
    assert torch.equal(product.matrix(), torch.kron(slow.matrix(), fast.matrix()))
    assert bool((product.row.diff() >= 0).all())


@few
@given(maps(), _WEIGHTS.filter(bool), st.integers(1, 2))
def test_transposed_scaled_and_raised(map_, weight, power):
    matrix = map_.matrix()
    assert torch.equal(map_.transposed().matrix(), matrix.T)
    assert map_.transposed().transposed() == map_
    assert torch.equal(map_.scaled(weight).matrix(), matrix * weight)
    rows = torch.arange(1.0, map_.new + 1).double()
    assert torch.equal(map_.scaled(rows).matrix(), matrix * rows[:, None])
    assert torch.equal(map_.power(power).matrix(), matrix**power)


@few
@given(st.lists(maps(), min_size=1, max_size=3))
def test_joined_maps_stand_along_the_diagonal(parts):
    assert torch.equal(joined(parts).matrix(), torch.block_diag(*(p.matrix() for p in parts)))


@few
@given(st.data(), maps(), st.integers(1, 3))
def test_apply_multiplies_any_axis(data, map_, dims):
    axis = data.draw(st.integers(0, dims - 1))
    shape = [map_.old if i == axis else 2 + i for i in range(dims)]
    tensor = torch.randn(shape, dtype=torch.float64)
    expected = torch.einsum("no,...o->...n", map_.matrix(), tensor.movedim(axis, -1))
    found = map_.apply(tensor, axis)
    torch.testing.assert_close(found, expected.movedim(-1, axis), rtol=1e-14, atol=1e-14)
    assert found.dtype == torch.float64


@few
@given(maps())
def test_maps_come_back_from_json(map_):
    assert LinearMap.from_dict(json.loads(json.dumps(map_.to_dict()))) == map_


@few
@given(maps())
def test_what_maps_say_about_themselves_is_true(map_):
    matrix = map_.matrix()
    identity = map_.new == map_.old and torch.equal(matrix, torch.eye(map_.new).double())
    assert map_.is_identity == identity
    assert map_.selects == bool(((matrix != 0).sum(1) <= 1).all())
    if map_.selects:
        found = [row.nonzero()[:, 0].tolist() for row in matrix]
        assert map_.sources().tolist() == [row[0] if row else -1 for row in found]
    row, column = torch.meshgrid(torch.arange(map_.new), torch.arange(map_.old), indexing="ij")
    assert torch.equal(map_.at(row.flatten(), column.flatten()), matrix.flatten())


def test_a_map_without_entries_makes_zeros():
    empty = LinearMap.of(3, [-1, -1])
    assert LinearMap.from_dict(empty.to_dict()) == empty
    assert torch.equal(empty.apply(torch.ones(2, 3), 1), torch.zeros(2, 2))
    assert empty != LinearMap.of(3, [-1, -1, -1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_copies_are_bit_for_bit_and_products_are_rounded_once(dtype):
    tensor = torch.randn(4, 3).to(dtype)
    assert torch.equal(LinearMap.of(4, [3, 0, 3]).apply(tensor, 0), tensor[[3, 0, 3]])
    third = LinearMap.of(4, [1, 2], 1 / 3).apply(tensor, 0)
    assert torch.equal(third, (tensor[[1, 2]].float() * (1 / 3)).to(dtype))


def test_an_axis_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"axis 1 of a tensor of shape \(2, 3\) has not 4 entries"):
        LinearMap.of(4, [0]).apply(torch.ones(2, 3), 1)


_COPIES = st.integers(1, 5).flatmap(
    lambda old: st.lists(st.integers(0, old - 1), max_size=5).map(
        lambda more: (old, [*range(old), *more])
    )
)


@few
@given(_COPIES)
def test_the_inverse_undoes_a_widening_by_copies(sizes):
    old, sources = sizes
    share = 1 / torch.bincount(torch.tensor(sources)).double()[sources]
    wider = SpaceMap(LinearMap.of(old, sources), LinearMap.of(old, sources, share.tolist()))
    back = wider.inverse()
    assert wider.error() < 1e-15
    assert back.inverse() == wider
    there_and_back = back.after(wider)
    for side in (there_and_back.carries, there_and_back.reads):
        torch.testing.assert_close(side.matrix(), torch.eye(old).double(), rtol=0, atol=1e-15)


@few
@given(st.data(), maps(new=st.just(3), old=st.just(2)), maps(new=st.just(3), old=st.just(2)))
def test_space_maps_come_back_from_json(data, carries, reads):
    flags = data.draw(st.none() | st.lists(st.booleans(), min_size=3, max_size=3))
    ahead = None if flags is None else torch.tensor(flags)
    space = SpaceMap(carries, reads, ahead)
    again = SpaceMap.from_dict(json.loads(json.dumps(space.to_dict())))
    assert again == space
    kept = None if again.ahead is None else again.ahead.tolist()
    assert kept == flags


def test_sides_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"carries is \(2, 2\) and reads \(3, 2\)"):
        SpaceMap(LinearMap.identity(2), LinearMap.of(2, [0, 1, 0]))
