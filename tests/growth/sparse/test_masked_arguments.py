"""What the masked layer refuses, and torch's products with 2:4 sparse weights."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apical import MaskedLinear
from apical.growth.sparse.layers import _semi_structured

IN, OUT = 37, 52


def a_mask() -> Tensor:
    return torch.rand(OUT, IN) < 0.4


def test_semi_structured_products_are_refused_without_their_gpu():
    layer = MaskedLinear(64, 64, support="nm", dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="cpu has no semi-structured products; they need"):
        layer.to_semi_structured()
    with pytest.raises(ValueError, match=r"weight is torch\.float32; expected float16 or bfloat16"):
        layer.float().to_semi_structured()
    dense = MaskedLinear(64, 64, sparsity=0.5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="mask stores more than 2 of 4 entries in a row"):
        dense.to_semi_structured()


def test_semi_structured_products_are_torchs(monkeypatch: pytest.MonkeyPatch):
    # its own products are torch's to test: here, that they get the masked weight
    layer = MaskedLinear(64, 32, support="nm", dtype=torch.bfloat16)
    monkeypatch.setattr(_semi_structured, "_has_products", lambda _: True)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight * 1)
    linear = layer.to_semi_structured()
    assert torch.equal(linear.weight, layer.weight)
    assert not linear.training
    assert not any(p.requires_grad for p in linear.parameters())
    # fewer than two of four fit as well
    one = MaskedLinear(62, 32, support="uniform", sparsity=0.99, dtype=torch.bfloat16)
    one.set_mask(torch.arange(62).expand(32, 62) % 4 == 1)
    assert torch.equal(one.to_semi_structured().weight, one.weight)


REFUSED = [
    ({"sparsity": 1.0}, "sparsity is 1.0; expected a share, 0 <= sparsity < 1"),
    ({"sparsity": -0.1}, "sparsity is -0.1"),
    ({"sparsity": float("nan")}, "sparsity is nan"),
    ({}, "sparsity is missing"),
    ({"sparsity": 0.5, "support": "ring"}, "support must be one of"),
    ({"support": "nm"}, "in_features is 37, which 4 of block=(2, 4) does not divide; the nearest "
     "it does: 36 and 40"),
    ({"support": "nm", "block": (1, 64)}, "the nearest it does: 64"),
    ({"support": "nm", "block": (5, 4)}, "block is (5, 4); expected (n, m) of nm, 0 < n <= m"),
    ({"support": "nm", "block": (1, 37), "sparsity": 0.5}, "sparsity is 0.5 and block=(1, 37)"),
    ({"sparsity": 0.9999}, "stores no entry"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_arguments_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        MaskedLinear(IN, OUT, **options)
    assert "\n" not in str(error.value)


def test_masks_and_weights_are_refused():
    linear, layer = nn.Linear(IN, OUT), MaskedLinear(IN, OUT, sparsity=0.5)
    for wrong in (a_mask().T, a_mask().float()):
        with pytest.raises(ValueError, match=r"expected \(52, 37\) torch\.bool"):
            layer.set_mask(wrong)
        with pytest.raises(ValueError, match=r"expected \(52, 37\) torch\.bool"):
            MaskedLinear.from_dense(linear, mask=wrong)
    with pytest.raises(ValueError, match="mask stores no entry"):
        layer.set_mask(torch.zeros(OUT, IN, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"sparsity is 0\.5; a mask has its own: pass None"):
        MaskedLinear.from_dense(linear, mask=a_mask(), sparsity=0.5)
    with pytest.raises(ValueError, match="init is 'largest'; expected"):
        MaskedLinear.from_dense(linear, sparsity=0.5, init="largest")  # pyright: ignore
    with pytest.raises(ValueError, match="support is 'grouped' with init='magnitude'"):
        MaskedLinear.from_dense(linear, sparsity=0.5, support="grouped")
    linear.weight.data[0, 0] = torch.nan
    for init in ("magnitude", "random"):
        with pytest.raises(ValueError, match="weight holds NaN or infinite entries"):
            MaskedLinear.from_dense(linear, sparsity=0.5, init=init)
