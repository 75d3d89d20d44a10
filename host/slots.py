"""Memslots: which host virtual page is behind a guest frame, and what of that changes when a new layout is set.

A layout is the set of slots of all VMs. It is replaced, never edited, and each VM's generation counts its publications: whoever
remembers a translation keeps the generation with it and asks again when it differs (spec §1.7; KVM's gfn_to_hva cache).

Invariants
* Slots of one VM do not overlap in guest frames. They may overlap in host pages (aliases); pages of two VMs are never shared.
* The ranges that reclaim walks cover every host page exactly once, whether a slot maps it or not: deleting a slot takes a page away
  from the guest, not from the host.

Deliberately not here: when a change takes effect and who waits for it (host/slot_change.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

UNMAPPED: Final = -1


class Memslot(NamedTuple):
    """gfns [base_gfn, base_gfn + pages) of ``vm`` are host virtual pages [base_hvp, ...)."""

    vm: int
    base_gfn: int
    pages: int
    base_hvp: int


class Region(NamedTuple):
    """Host virtual pages [first_hvp, first_hvp + pages) belong to ``vm``, whatever its slots say."""

    vm: int
    first_hvp: int
    pages: int


class Range(NamedTuple):
    """A run of host pages for the clock of reclaim; ``first_gfn`` is UNMAPPED where no slot maps it."""

    vm: int
    first_hvp: int
    pages: int
    first_gfn: int


class Slots:
    """The layout of all VMs. ``regions``: the host memory of each VM; by default just what its first slots map."""

    def __init__(self, slots: Sequence[Memslot], vms: int, regions: Sequence[Region] = ()) -> None:
        self.regions = tuple(regions) or tuple(Region(s.vm, s.base_hvp, s.pages) for s in slots)
        self.host_pages = max((r.first_hvp + r.pages for r in self.regions), default=0)
        self.generation = [0] * vms
        self._of_vm: list[tuple[Memslot, ...]] = [()] * vms
        self.ranges: tuple[Range, ...] = ()
        self.aliased = False
        for vm in range(vms):
            self.check(vm, [s for s in slots if s.vm == vm])
            self._of_vm[vm] = tuple(s for s in slots if s.vm == vm)
        self._walk()

    def of_vm(self, vm: int) -> tuple[Memslot, ...]:
        """The slots of one VM."""
        return self._of_vm[vm]

    def all(self) -> list[Memslot]:
        """Every slot of every VM."""
        return [slot for slots in self._of_vm for slot in slots]

    def replace(self, slots: Sequence[Memslot]) -> None:
        """Another layout for all VMs, before anybody has used this one: an image brings its own. ValueError if it is none."""
        for vm in range(len(self._of_vm)):
            mine = [slot for slot in slots if slot.vm == vm]
            self.check(vm, mine)
            self.publish(vm, mine)

    def slot_of(self, vm: int, gfn: int) -> Memslot | None:
        """The slot that backs a guest frame."""
        for slot in self._of_vm[vm]:
            if slot.base_gfn <= gfn < slot.base_gfn + slot.pages:
                return slot
        return None

    def find(self, vm: int, gfn: int) -> int:
        """Host virtual page of a guest frame, UNMAPPED when no slot backs it."""
        slot = self.slot_of(vm, gfn)
        return UNMAPPED if slot is None else slot.base_hvp + gfn - slot.base_gfn

    def gfns_of(self, vm: int, hvp: int) -> list[int]:
        """Reverse map: every guest frame that a slot gives this page."""
        return [
            s.base_gfn + hvp - s.base_hvp for s in self._of_vm[vm] if s.base_hvp <= hvp < s.base_hvp + s.pages
        ]

    def check(self, vm: int, slots: Iterable[Memslot]) -> None:
        """ValueError unless the slots are a layout of ``vm``: of this VM, in its host memory, disjoint in guest frames."""
        end = 0
        for slot in sorted(slots, key=lambda s: s.base_gfn):
            inside = any(
                r.vm == vm
                and r.first_hvp <= slot.base_hvp
                and slot.base_hvp + slot.pages <= r.first_hvp + r.pages
                for r in self.regions
            )
            if slot.vm != vm or slot.pages < 1 or slot.base_gfn < end or not inside:
                raise ValueError(f"{slot} does not fit into the layout of VM {vm}")
            end = slot.base_gfn + slot.pages

    def publish(self, vm: int, slots: Iterable[Memslot]) -> int:
        """Make ``slots`` the layout of a VM; returns its new generation. Slots and number change together (BZ-21)."""
        self._of_vm[vm] = tuple(slots)
        self.generation[vm] += 1
        self._walk()
        return self.generation[vm]

    def _walk(self) -> None:
        """Cut every VM's host memory at the borders of its slots."""
        ranges = []
        self.aliased = False
        for region in self.regions:
            end = region.first_hvp + region.pages
            inside = [
                s
                for s in self._of_vm[region.vm]
                if s.base_hvp < end and s.base_hvp + s.pages > region.first_hvp
            ]
            borders = {region.first_hvp, end}
            borders |= {hvp for s in inside for hvp in (s.base_hvp, s.base_hvp + s.pages)}
            cuts = sorted(borders)
            for first, after in pairwise(cuts):
                gfns = self.gfns_of(region.vm, first)
                self.aliased = self.aliased or len(gfns) > 1
                ranges.append(Range(region.vm, first, after - first, gfns[0] if gfns else UNMAPPED))
        self.ranges = tuple(ranges)


def moved(
    slots: Iterable[Memslot], vm: int, page: int, pages: int, to_hvp: int
) -> tuple[list[Memslot], list[tuple[int, int, int]]]:
    """(layout, moves) that put the guest frames [page, page + pages) on host pages from ``to_hvp`` on. Frames without a slot get none."""
    layout: list[Memslot] = []
    moves: list[tuple[int, int, int]] = []
    for slot in slots:
        layout += outside(slot, page, pages)
        first, end = max(slot.base_gfn, page), min(slot.base_gfn + slot.pages, page + pages)
        if first < end:
            to = to_hvp + first - page
            layout.append(Memslot(vm, first, end - first, to))
            moves.append((slot.base_hvp + first - slot.base_gfn, to, end - first))
    return layout, moves


def cut_out(slots: Iterable[Memslot], page: int, pages: int) -> tuple[list[Memslot], list[Memslot]]:
    """(what is left, what is taken out) without the guest frames [page, page + pages)."""
    left = [part for slot in slots for part in outside(slot, page, pages)]
    return left, without(slots, left)


def without(slots: Iterable[Memslot], others: Iterable[Memslot]) -> list[Memslot]:
    """The parts of ``slots`` whose guest frames ``others`` do not map to the same host pages."""
    left = list(slots)
    for other in others:
        cut: list[Memslot] = []
        for slot in left:
            if slot.vm != other.vm or slot.base_hvp - slot.base_gfn != other.base_hvp - other.base_gfn:
                cut.append(slot)
                continue
            cut += outside(slot, other.base_gfn, other.pages)
        left = cut
    return left


def outside(slot: Memslot, first_gfn: int, pages: int) -> list[Memslot]:
    """What is left of a slot when the guest frames [first_gfn, first_gfn + pages) are taken out."""
    end, after = slot.base_gfn + slot.pages, first_gfn + pages
    parts = []
    if slot.base_gfn < first_gfn:
        parts.append(slot._replace(pages=min(slot.pages, first_gfn - slot.base_gfn)))
    if end > after:
        start = max(slot.base_gfn, after)
        parts.append(Memslot(slot.vm, start, end - start, slot.base_hvp + start - slot.base_gfn))
    return parts
