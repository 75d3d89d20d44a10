"""Memslots that a scenario's script changes, one page at a time, and who a host page belongs to afterwards."""

from __future__ import annotations

from host.events import SetMemslots
from host.slots import Memslot, Slots, cut_out, moved
from sim.events import ChangeSlots


class Layouts:
    """``pages``: guest frames of the one VM, whose host pages have the same numbers; spare ones follow."""

    def __init__(self, pages: int) -> None:
        self._spare = pages
        self._deleted: dict[int, list[Memslot]] = {}
        self._moved: dict[int, int] = {}
        """gfn of a spare host page that is or was used."""

    def change(self, slots: Slots, request: ChangeSlots) -> SetMemslots:
        """The layout that a step asks for, from the one in force."""
        now, gfn = slots.of_vm(0), request.gfn
        if request.do == "slot_delete":
            left, self._deleted[gfn] = cut_out(now, gfn, 1)
            return SetMemslots(0, tuple(left))
        if request.do == "slot_add":
            return SetMemslots(0, (*now, *self._deleted.pop(gfn)))
        layout, moves = moved(now, 0, gfn, 1, self._spare)
        self._moved[self._spare] = gfn
        self._spare += 1
        return SetMemslots(0, tuple(layout), () if request.fresh else tuple(moves))

    def gfn_of(self, hvp: int) -> int:
        """The guest frame that a host page is, or was last, behind."""
        return self._moved.get(hvp, hvp)
