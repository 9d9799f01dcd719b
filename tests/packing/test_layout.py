import pytest
import torch

from apical.packing import document_bounds, position_ids

# one document; an empty one first, inside and last; none at all
LENGTHS = [[4], [0, 3, 0, 1, 2, 0], []]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("start", [0, 2])  # 2: RoBERTa, whose padding_idx is 1
def test_positions_count_from_start_in_every_document(lengths, start):
    expected = [start + place for length in lengths for place in range(length)]
    ids = position_ids(lengths, start)
    assert ids.dtype == torch.int64
    assert ids.tolist() == expected


@pytest.mark.parametrize("lengths", LENGTHS)
def test_bounds_are_the_running_sum(lengths):
    bounds = document_bounds(lengths)
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]


def test_tensors_are_lengths_too():
    lengths = torch.tensor([2, 1], dtype=torch.int32)
    assert position_ids(lengths).tolist() == [0, 1, 0]
    assert document_bounds(lengths).tolist() == [0, 2, 3]


def test_what_is_no_length_is_refused():
    with pytest.raises(ValueError, match=r"lengths hold -1, expected 0 or more"):
        position_ids([3, -1])
    with pytest.raises(ValueError, match=r"sum to 2147483648, expected less than 2\*\*31"):
        document_bounds([2**30, 2**30])
