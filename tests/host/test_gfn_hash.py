"""The gfn hash against a plain set, and its slot order against the known vectors."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host.gfn_hash import EMPTY, GfnHash
from proto.kvm import GFN_HASH_SLOTS, hash_32

HOME_63 = [34, 89, 178, 233, 267, 322]
HOME_0 = [0, 55, 144, 199, 288, 343]


@pytest.mark.parametrize(
    ("value", "home"),
    [(0, 0), (1, 24), (2, 48), (0x100, 50), (0x1234, 61), (0x7FFFF, 52), (0x80000, 12), (0xABCDEF, 35)],
)
def test_hash_vectors(value: int, home: int) -> None:
    assert hash_32(value, 6) == home


def test_wrap_around_and_backward_shift() -> None:
    table = GfnHash()
    for gfn in HOME_63 + HOME_0:
        table.add(gfn)
    assert table.remove(HOME_63[0])
    assert all(gfn in table for gfn in HOME_63[1:] + HOME_0)
    assert HOME_63[0] not in table


def test_removing_an_absent_gfn_erases_nothing() -> None:
    table = GfnHash()
    table.add(0)
    assert not table.remove(55), "same home slot, another gfn (BZ-32)"
    assert 0 in table


def test_full_table() -> None:
    table = GfnHash()
    for gfn in range(GFN_HASH_SLOTS):
        table.add(gfn)
    assert 1000 not in table
    with pytest.raises(OverflowError):
        table.add(1000)


gfns = st.one_of(st.sampled_from(HOME_63 + HOME_0), st.integers(0, 1 << 40))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.booleans(), gfns), max_size=200))
def test_behaves_like_a_set_and_every_entry_is_reachable(steps: list[tuple[bool, int]]) -> None:
    table, model = GfnHash(), set[int]()
    for insert, gfn in steps:
        if insert and gfn not in model and len(model) < GFN_HASH_SLOTS:
            table.add(gfn)
            model.add(gfn)
        elif not insert:
            assert table.remove(gfn) is (gfn in model)
            model.discard(gfn)
        assert {g for g in table.slots if g != EMPTY} == model
        assert all(g in table for g in model)
