"""The host's side of the nested table against a dictionary, and as a walker finds it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.layout import NPT_A, NPT_ADDR, NPT_D, NPT_P, NPT_W, npt_tables
from proto.pagetable import (
    npt_clear,
    npt_get,
    npt_init,
    npt_make_readonly,
    npt_set,
    npt_test_clear_accessed,
)

SIZES = [1, 511, 512, 513, 5000, 512 * 512, 512 * 512 + 1, 3 * 512 * 512 + 77]
TABLE = np.zeros(npt_tables(max(SIZES)) * 512, np.uint64)


def table(pages: int) -> np.ndarray:
    npt = TABLE[: npt_tables(pages) * 512]
    npt_init(npt)
    return npt


def walk(npt: np.ndarray, gfn: int) -> int:
    """The leaf of ``gfn`` as a walker finds it, through the entries; 0 if a level is missing."""
    at = 0
    for shift in (27, 18, 9):
        entry = int(npt[at * 512 + (gfn >> shift & 511)])
        if not entry & NPT_P:
            return 0
        at = (entry & NPT_ADDR) >> 12
        assert 0 < at < len(npt) // 512
    return int(npt[at * 512 + (gfn & 511)])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SIZES), st.integers(0, 1 << 32))
def test_equals_a_dictionary(pages: int, seed: int) -> None:
    rng = random.Random(seed)
    npt = table(pages)
    twin: dict[int, int] = {}
    edges = [0, pages - 1, pages // 2, min(511, pages - 1), min(512, pages - 1), min(1 << 18, pages - 1)]
    for _ in range(80):
        gfn = rng.choice([*edges, rng.randrange(pages)])
        before = twin.get(gfn, 0)
        match rng.randrange(6):
            case 0 | 1:
                frame, writable = rng.randrange(1 << 24), rng.random() < 0.5
                assert int(npt_set(npt, gfn, frame, writable)) == before
                twin[gfn] = frame << 12 | NPT_P | (NPT_W if writable else 0)
            case 2:
                assert int(npt_clear(npt, gfn)) == before
                twin[gfn] = 0
            case 3 if before:
                bits = rng.choice([NPT_A, NPT_A | NPT_D])
                index = np.flatnonzero(npt == before)
                if len(index) == 1:
                    npt[index[0]] |= np.uint64(bits)
                    twin[gfn] = before | bits
            case 4:
                assert npt_test_clear_accessed(npt, gfn) == bool(before & NPT_A)
                twin[gfn] = before & ~NPT_A
            case _:
                assert int(npt_make_readonly(npt, gfn)) == before
                twin[gfn] = before & ~NPT_W
    for gfn, entry in twin.items():
        assert int(npt_get(npt, gfn)) == entry
        assert walk(npt, gfn) == entry


@pytest.mark.parametrize("pages", SIZES)
def test_every_leaf_has_its_own_place(pages: int) -> None:
    npt = table(pages)
    gfns = sorted({0, 1, pages - 1, *range(0, pages, max(1, pages // 300)), *range(0, min(pages, 1100), 100)})
    for gfn in gfns:
        npt_set(npt, gfn, gfn, True)
    assert [walk(npt, gfn) >> 12 for gfn in gfns] == gfns
    for gfn in gfns[::2]:
        npt_clear(npt, gfn)
    assert [bool(npt_get(npt, gfn)) for gfn in gfns] == [i % 2 == 1 for i in range(len(gfns))]


@pytest.mark.parametrize("pages", SIZES)
def test_gfns_out_of_reach(pages: int) -> None:
    npt = table(pages)
    reach = -(-pages // 512) * 512
    npt_set(npt, reach - 1, 1, True)
    before = npt.copy()
    for gfn in (reach, reach + 512, 1 << 40, -1):
        with pytest.raises(IndexError, match="beyond the nested table"):
            npt_set(npt, gfn, 1, True)
        assert int(npt_get(npt, gfn)) == 0
        assert int(npt_clear(npt, gfn)) == 0
        assert not npt_test_clear_accessed(npt, gfn)
        assert int(npt_make_readonly(npt, gfn)) == 0
    assert np.array_equal(npt, before)
