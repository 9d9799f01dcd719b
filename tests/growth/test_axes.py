import pytest

from apical.growth.spaces.axes import parse

_SIZES = {"heads": 4, "kv_heads": 2, "q_dim": 8, "k_dim": 8, "ffn": 10}


@pytest.mark.parametrize(
    ("text", "size", "spaces", "reads"),
    [
        pytest.param("ffn", 10, ["ffn"], False, id="one space"),
        pytest.param("<ffn", 10, ["ffn"], True, id="read"),
        pytest.param("<heads q_dim", 32, ["heads", "q_dim"], True, id="a product, read"),
        pytest.param(
            "heads q_dim | kv_heads k_dim", 48, ["heads", "q_dim", "kv_heads", "k_dim"], False,
            id="one after the other",
        ),
        pytest.param(
            "heads (q_dim | k_dim)", 64, ["heads", "q_dim", "k_dim"], False, id="for each head",
        ),
        pytest.param("2 | ffn", 12, ["ffn"], False, id="what never grows"),
        pytest.param("2 heads (q_dim (1 | 2))", 192, ["heads", "q_dim"], False, id="nested"),
    ],
)  # fmt: skip
def test_notation_says_sizes_spaces_and_direction(text, size, spaces, reads):
    axis = parse(text)
    assert axis.size(_SIZES) == size
    assert list(axis.spaces()) == spaces
    assert axis.reads == reads


def test_products_are_slowest_first():
    def leaf(factor):
        return [factor] if isinstance(factor, int) else [f"{factor}{i}" for i in range(2)]

    def product(slow, fast):
        return [f"{s}.{f}" for s in slow for f in fast]

    found = parse("h (q | k) | v").fold(
        leaf, product, lambda parts: [x for part in parts for x in part]
    )
    assert found == ["h0.q0", "h0.q1", "h0.k0", "h0.k1", "h1.q0", "h1.q1", "h1.k0", "h1.k1",
                     "v0", "v1"]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<",
        "a |",
        "| a",
        "a b)",
        "a (b",
        "a (b |)",
        "a ()",
        "a, b",
        "a-b",
        "a << b",
        "a+1",
        "()",
    ],
)
def test_notation_that_means_nothing_is_refused(text):
    with pytest.raises(ValueError, match="axis"):
        parse(text)
