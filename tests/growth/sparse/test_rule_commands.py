"""`apical sparsify` offers what rules take, and nothing that they refuse."""

from typing import get_args

import pytest

from apical import cli
from apical.growth.sparse.rules import Drawn
from apical.kernels.sparse_low_rank.support import KINDS


@pytest.mark.parametrize("rule", ["sparse-low-rank", "masked"])
def test_supports_are_those_drawn_from_a_seed(rule: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(["sparsify", "a", "b", rule, "--support", "explicit"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert all(kind in error for kind in KINDS)
    with pytest.raises(SystemExit):
        cli.main(["sparsify", "a", "b", rule, "--help"])
    said = capsys.readouterr().out
    assert "grouped" in said
    assert "explicit" not in said


def test_no_kind_of_support_is_forgotten():
    assert get_args(Drawn) == KINDS
