"""What follows from a chosen map: before norms, behind them, in heads and in their rotations."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from apical.growth.maps import LinearMap, SpaceMap
from apical.growth.operators.widen import New, Widen, cycle, head_sources
from apical.growth.spaces import architecture_of
from apical.growth.widths import before_layer_norm, before_rms, faults, read_by, rotary_sources

few = settings(max_examples=40, deadline=None)
_LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}


def _copies(old: int, new: int, how: New = "copy") -> SpaceMap:
    return Widen(new=how)._map(old, cycle(old, new, how))


def _rms(x):
    return x / x.square().mean().sqrt()


def _layer_norm(x):
    return (x - x.mean()) / x.var(correction=0).sqrt()


@few
@given(st.integers(1, 9), st.integers(0, 12), st.sampled_from(["copy", "zero"]))
def test_before_an_rms_norm_the_mean_of_squares_stays(old, more, how):
    space = before_rms(_copies(old, old + more, how))
    x = torch.randn(old).double()
    y = space.carries.apply(x, 0)
    torch.testing.assert_close(y.square().mean(), x.square().mean(), rtol=1e-12, atol=0)
    assert space.error() < 1e-12


@few
@given(st.integers(2, 9), st.integers(0, 12))
def test_before_a_layer_norm_mean_and_variance_stay(old, more):
    spaces = {
        "zero": before_layer_norm(_copies(old, old + more, "zero")),
        "copy": before_layer_norm(_copies(old, 3 * old)),
    }
    x = torch.randn(old).double()
    for how, space in spaces.items():
        y = space.carries.apply(x, 0)
        torch.testing.assert_close(y.var(correction=0), x.var(correction=0), rtol=1e-12, atol=0)
        normal = _layer_norm(y)
        back = space.reads.transposed().apply(normal, 0) if how == "copy" else None
        factor = ((old + more) / old) ** 0.5
        expected = _layer_norm(x)
        found = back if how == "copy" else normal[:old] / factor
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        assert how == "copy" or normal[old:].abs().sum() < 1e-10


@few
@given(st.integers(1, 6), st.integers(0, 9))
def test_a_tied_head_reads_through_the_rows_of_the_embedding(old, more):
    base = _copies(old, old + more)
    embedded = before_rms(base)
    final = read_by(embedded, base)
    state, rows = torch.randn(old).double(), torch.randn(7, old).double()
    wide_rows = embedded.carries.apply(rows, 1)
    logits = wide_rows @ final.carries.apply(state, 0)
    torch.testing.assert_close(logits, rows @ state, rtol=1e-11, atol=1e-11)


@few
@given(st.integers(1, 12), st.integers(0, 24), st.sampled_from([1.0, 0.5, 0.25]))
def test_rotated_dimensions_keep_their_frequencies(half, more, share):
    old, new = int(2 * half / share), int(2 * (half + more) / share)
    sources = rotary_sources(old, new, share)
    turned_old, turned = int(old * share), int(new * share)

    def frequency(at, turned):
        return 10_000.0 ** (-2 * (at % (turned // 2)) / turned)

    assert len(sources) == new
    for at, source in enumerate(sources[:turned]):
        if source >= 0:
            assert source < turned_old
            # of the same half: the pair turns together
            assert source // (turned_old // 2) == at // (turned // 2)
            expected = frequency(source, turned_old)
            assert frequency(at, turned) == pytest.approx(expected, rel=1e-12)
    found = [source for source in sources if source >= 0]
    assert len(set(found)) == len(found)
    if new % old == 0:  # then every frequency is there again
        assert sorted(found) == list(range(old))


_GROUPS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@few
@given(_GROUPS, _GROUPS, st.sampled_from(["copy", "zero"]))
def test_each_query_head_meets_its_own_keys(old_groups, new_groups, how):
    (old_kv, old_group), (new_kv, new_group) = old_groups, new_groups
    old = {"kv_heads": old_kv, "heads": old_kv * old_group}
    new = {"kv_heads": new_kv, "heads": new_kv * new_group}
    assume(new["kv_heads"] >= old["kv_heads"] and new["heads"] >= old["heads"])
    heads, kv_heads = head_sources(old, new, how)
    assert len(heads) == new["heads"]
    assert len(kv_heads) == new["kv_heads"]
    for at, source in enumerate(heads):
        if source >= 0:
            assert kv_heads[at // new_group] == source // old_group
    kept = [source for source in heads if source >= 0]
    # where old heads fit, all of them are there
    room = min(kv_heads.count(k) for k in range(old_kv)) * new_group
    if room >= old_group:
        assert set(kept) == set(range(old["heads"]))
        assert how == "copy" or len(kept) == len(set(kept)) == old["heads"]


def _faults(**spaces):
    return faults(architecture_of(_LLAMA), _LLAMA, spaces)


def test_queries_that_meet_other_keys_are_a_fault():
    heads = Widen()._map(4, [0, 0, 1, 1, 2, 2, 3, 3])
    tiled, repeated = _copies(2, 4), Widen()._map(2, [0, 0, 1, 1])
    assert "old head 1 meet keys that are not its own" in _faults(heads=heads, kv_heads=tiled)[0]
    assert _faults(heads=heads, kv_heads=repeated) == []


def test_dimensions_at_another_frequency_are_a_fault():
    appended = _copies(4, 8, "zero")
    assert "another frequency" in _faults(qk_dim=appended, v_dim=appended)[0]
    placed = Widen()._map(4, rotary_sources(4, 8, 1.0))
    assert _faults(qk_dim=placed, v_dim=appended) == []


def test_what_is_read_twice_is_a_fault():
    twice = LinearMap.of(16, [*range(16)] * 2)
    assert _faults(ffn=SpaceMap(twice, twice)) == ["ffn: what is read is not what was written"]
    assert _faults(ffn=_copies(16, 32)) == []
