"""Layouts of guest memory: lookup both ways, what differs between two, what reclaim walks over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host.slots import UNMAPPED, Memslot, Range, Region, Slots, outside, without

WHOLE = Memslot(0, 0, 100, 0)


def test_lookup_in_both_directions() -> None:
    slots = Slots([Memslot(0, 0, 10, 0), Memslot(0, 50, 10, 10), Memslot(1, 0, 5, 20)], 2)
    assert [slots.find(0, gfn) for gfn in (0, 9, 10, 49, 50, 59, 60)] == [
        0,
        9,
        UNMAPPED,
        UNMAPPED,
        10,
        19,
        UNMAPPED,
    ]
    assert slots.find(1, 4) == 24
    assert slots.gfns_of(0, 12) == [52]
    assert slots.gfns_of(1, 12) == []


def test_a_page_may_be_mapped_twice() -> None:
    slots = Slots([WHOLE, Memslot(0, 200, 10, 40)], 1, [Region(0, 0, 100)])
    assert slots.aliased
    assert slots.gfns_of(0, 45) == [45, 205]
    assert sum(r.pages for r in slots.ranges) == 100, "the clock sees every host page once"


def test_slots_and_generation_change_together() -> None:
    slots = Slots([WHOLE], 1)
    assert slots.generation == [0]
    assert slots.publish(0, [Memslot(0, 0, 50, 0)]) == 1
    assert slots.find(0, 60) == UNMAPPED
    assert slots.ranges == (Range(0, 0, 50, 0), Range(0, 50, 50, UNMAPPED)), "deleted pages stay reclaimable"


@pytest.mark.parametrize(
    "bad",
    [
        [Memslot(0, 0, 10, 95)],
        [Memslot(0, 0, 10, 0), Memslot(0, 9, 10, 20)],
        [Memslot(0, 0, 0, 0)],
        [Memslot(1, 0, 10, 0)],
        [Memslot(0, 0, 10, 100)],
    ],
    ids=["beyond the host memory", "overlap", "empty", "of another VM", "memory of another VM"],
)
def test_what_is_no_layout_is_refused(bad: list[Memslot]) -> None:
    slots = Slots([WHOLE, Memslot(1, 0, 50, 100)], 2)
    with pytest.raises(ValueError, match="does not fit"):
        slots.check(0, bad)


def pieces(draw_from: int = 60) -> st.SearchStrategy[list[Memslot]]:
    """Layouts of up to four slots over 60 guest frames."""

    def build(cuts: list[tuple[int, int, int]]) -> list[Memslot]:
        out, at = [], 0
        for gap, pages, hvp in cuts:
            out.append(Memslot(0, at + gap, pages, hvp))
            at += gap + pages
        return out

    part = st.tuples(st.integers(0, 5), st.integers(1, 10), st.integers(0, draw_from))
    return st.lists(part, max_size=4).map(build)


def as_pairs(slots: list[Memslot]) -> set[tuple[int, int]]:
    return {(s.base_gfn + i, s.base_hvp + i) for s in slots for i in range(s.pages)}


@given(pieces(), pieces())
def test_the_difference_of_layouts_is_that_of_their_pages(old: list[Memslot], new: list[Memslot]) -> None:
    assert as_pairs(without(old, new)) == as_pairs(old) - as_pairs(new)


@given(st.integers(0, 30), st.integers(1, 30), st.integers(0, 60), st.integers(1, 30))
def test_cutting_a_slot(base: int, pages: int, first: int, count: int) -> None:
    left = outside(Memslot(0, base, pages, 7), first, count)
    assert as_pairs(left) == {
        (g, h) for g, h in as_pairs([Memslot(0, base, pages, 7)]) if not first <= g < first + count
    }
