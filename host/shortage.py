"""When memory is short for good, and which guest has to give some back. Part of the vm machine.

Swap is full. Pages that found no slot are stuck in their frames (host/page_out.py); all other frames can still change their page, for one
that has a slot. Memory is short when somebody waits for a frame and fewer of these are left than the vCPUs need to execute an instruction
each: from there on pages would chase each other and nobody would get anywhere. Writes under way that are going to free a slot count as if
they had.

Then one guest is told (`MemoryShort`, an exception at an entry): the one with the largest footprint, frames and slots together, of those
that have something to give; the lower number wins a tie. A guest that answers with nothing is not asked again until memory was found
somewhere. When nobody has anything, the run ends (`OutOfMemory`).

Invariants
* One notice is open at a time. It ends with the guest's answer, or when whoever took it is reset or powers down.
* While it is open, reclaim rests.

Not handled here: which task (guest/oom.py), which vCPU takes the notice (host/notices.py), how pages leave (host/giveback.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from host.events import LoadPage, MemoryGiven, MemoryShort, NoticeLost, OutOfMemory, SavePage
from host.kernels import HPT_EVICT, HPT_READING, HPT_RESIDENT, HPT_WRITING
from proto.stats import HostCounter
from proto.wire import OOM_KILLED, OOM_PENDING

if TYPE_CHECKING:
    from host.vm import VmMachine


class Shortage:
    """Notices to the guests, one after the other."""

    def __init__(self, machine: VmMachine) -> None:
        self._m = machine
        self._number = 0
        self._vm = -1
        """Who was told; -1: nobody."""
        self._empty: set[int] = set()
        """VMs that had nothing to give."""
        self._deaf: set[int] = set()
        """VMs without a vCPU that could be told, when that was tried."""
        self._over = False

    def heard(self, vm: int) -> None:
        """A vCPU of this VM asks for a page: one that can be told."""
        self._deaf.discard(vm)

    @property
    def open(self) -> bool:
        """Whether a guest was told and has not answered."""
        return self._vm >= 0

    def look(self) -> None:
        """Somebody waits for a frame and swap is full: is it bad enough?"""
        m = self._m
        if self.open or self._over or m.giveback.pending or m.page_out.stand:
            # What no daemon takes now may well be taken by the next.
            return
        movable = m.memory.frame_count - m.page_out.stuck + m.page_out.slots_coming
        if movable - m.limits.reserve < m.limits.least and m.waiters.starved(urgent=False):
            self._ask(movable)
        elif movable <= 0 and (waiting := m.waiters.starved(urgent=True)):
            # Images are read and written while no guest runs that could be asked.
            self._ask(movable, nobody=all(type(event) in (LoadPage, SavePage) for event in waiting))

    def _ask(self, movable: int, *, nobody: bool = False) -> None:
        """Tell the largest guest that can still help."""
        m = self._m
        able = set() if nobody else set(range(m.memory.vm_count)) - self._empty - self._deaf
        sizes = {vm: self.footprint(vm) for vm in able}
        vm = max(sizes, key=lambda one: (sizes[one], -one), default=-1)
        if vm < 0:
            if movable <= 0 or not self._deaf:
                self._over = True
                m.emit(OutOfMemory(m.waiters.starving))
            # Else the vCPUs stand still, for a save: that needs no more than one frame.
            return
        self._number += 1
        self._vm = vm
        m.obs.count(HostCounter.OOM_NOTICES)
        m.emit(MemoryShort(vm, self._number))

    def footprint(self, vm: int) -> int:
        """Frames and swap slots that the memory of a VM takes; a page with both counts twice, since both would be freed."""
        m, found = self._m, 0
        for region in m.slots.regions:
            if region.vm == vm:
                part = slice(region.first_hvp, region.first_hvp + region.pages)
                framed = np.isin(m.state[part], (HPT_RESIDENT, HPT_EVICT, HPT_WRITING, HPT_READING))
                found += int(np.count_nonzero(framed)) + int(np.count_nonzero(m.slot_of[part] >= 0))
        return found

    def given(self, event: MemoryGiven) -> None:
        """A guest answers. One that is still stopping its victim has every vCPU look."""
        if (event.vm, event.number) != (self._vm, self._number):
            return
        m = self._m
        m.obs.count(HostCounter.OOM_KILLS, bool(event.flags & OOM_KILLED))
        if event.flags & OOM_PENDING:
            m.emit(MemoryShort(self._vm, 0))
            return
        if event.pages:
            self._empty.clear()
        else:
            self._empty.add(self._vm)
        self._vm = -1

    def lost(self, event: NoticeLost) -> None:
        """Nobody is going to answer: the next look begins anew."""
        if (event.vm, event.number) == (self._vm, self._number):
            if event.nobody:
                self._deaf.add(self._vm)
            self._vm = -1
