"""Frames for those who wait: victims, and the grace until nobody can reach them. Part of the vm machine.

Below the low mark batches of pages are unmapped until the frames on their way plus the free ones reach the high mark.

Invariant: a page leaves a nested table in this order: clear the entry, bump the flush generation, wait for every vCPU of the VM to
acknowledge or to be outside guest mode, checksum, write. Its frame is free only after the write was acknowledged (or, clean, after the
grace). Until then a fault takes the page back.

Not handled here: the choice among the pages of a range (host/kernels.py, a clock), what becomes of a page after the grace
(host/page_out.py), memory that is short for good (host/shortage.py).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from host import kernels
from host.kernels import F_STUCK, F_WRITEBACK, HPT_EVICT, HPT_RESIDENT
from host.slots import UNMAPPED, Range
from proto.layout import NPT_D
from proto.stats import HostCounter
from proto.trace import Kind
from proto.units import FLUSH_BATCH

if TYPE_CHECKING:
    from host.vm import VmMachine


class _Unmapped(NamedTuple):
    """A victim between unmapping and the end of its grace period."""

    hvp: int
    generation: int


class Reclaim:
    """Victims of all VMs."""

    __slots__ = (
        "_generation", "_hands", "_m", "_next_range", "_state", "_unmapped", "_victims", "found_none", "in_grace", "under_way",
    )  # fmt: skip

    def __init__(self, machine: VmMachine) -> None:
        self._m = machine
        self._state = machine.state.data
        self._victims = np.zeros(FLUSH_BATCH, np.int64)
        self._generation = np.zeros(len(machine.state), np.int64).data
        """Under which each page was unmapped last."""
        self._unmapped: list[deque[_Unmapped]] = [deque() for _ in range(machine.memory.vm_count)]
        self._hands: dict[Range, int] = {}
        self._next_range = 0
        self.in_grace = 0
        """Victims whose grace has not ended."""
        self.under_way = False
        """The high mark has not been reached since the low one was passed."""
        self.found_none = False
        """Somebody waits for a frame, and every page was too hot to be a victim just now."""

    def look(self) -> None:
        """Unmap as much as is missing."""
        m = self._m
        starving = m.waiters.starving
        self.found_none = False
        stand = m.page_out.stand
        if m.shortage.open or ((m.page_out.swap_full or stand) and not starving):
            # What is short now comes from a guest; and where nobody waits, more attempts would only find that there is no slot, or no
            # daemon.
            self.under_way = False
            return
        if m.frames.free_count < m.limits.low or starving:
            self.under_way = True
        while self.under_way:
            # While no daemon takes writes, those who wait are served and nothing is laid in: what is in use is more needed.
            wanted, writes = (starving, 0) if stand else (m.limits.high, m.page_out.coming)
            coming = self.in_grace + writes
            missing = wanted - m.frames.free_count - coming
            if missing <= 0:
                self.under_way = m.frames.free_count < wanted
                return
            if self._unmap_batch(min(missing, FLUSH_BATCH)) == 0:
                self.found_none = starving > 0 and coming == 0 and self._evictable()
                return

    def _evictable(self) -> bool:
        """Whether some page is only too hot to be a victim."""
        m = self._m
        return bool(np.any((m.state == HPT_RESIDENT) & (m.flags & (F_WRITEBACK | F_STUCK) == 0)))

    def _unmap_batch(self, want: int) -> int:
        """One flush generation: victims from the host's memory, range by range; returns how many."""
        slots = self._m.slots
        ranges = slots.ranges
        for _ in range(len(ranges)):
            part = ranges[self._next_range % len(ranges)]
            self._next_range = (self._next_range + 1) % len(ranges)
            found = self._victims_in(part, want)
            if found:
                victims = self._victims[:found].tolist()
                if slots.aliased:
                    self._unmap_aliases(part, victims)
                self.begin_grace(part.vm, victims)
                return found
        return 0

    def _victims_in(self, part: Range, want: int) -> int:
        """Victims of one range into ``_victims``; returns how many."""
        m = self._m
        hand = self._hands.get(part, 0)
        if part.first_gfn != UNMAPPED:
            hand, found = m.memory.pick_victims(
                part.vm, m.state, m.flags, part.first_hvp, part.pages, part.first_gfn, hand, want, self._victims
            )  # fmt: skip
        elif m.change.moving and not m.waiters.starving:
            # Those that wait for a frame may be pages of the move, which waits for them: then these have to go first.
            return 0
        else:
            hand, found = kernels.pick_unmapped(
                m.state, m.flags, part.first_hvp, part.pages, hand, want, self._victims
            )
        self._hands[part] = int(hand)
        return int(found)

    def _unmap_aliases(self, part: Range, victims: list[int]) -> None:
        """The other guest frames of pages that are mapped more than once."""
        m = self._m
        for hvp in victims:
            for gfn in m.slots.gfns_of(part.vm, hvp):
                if m.memory.unmap(part.vm, gfn) & NPT_D:
                    m.mark_dirty(hvp)

    def begin_grace(self, vm: int, hvps: list[int]) -> None:
        """These pages are in no nested table any more, and are in EVICT."""
        m = self._m
        generation = m.memory.bump_generation(vm)
        m.obs.count(HostCounter.FLUSHES)
        queue = self._unmapped[vm]
        for hvp in hvps:
            self._generation[hvp] = generation
            queue.append(_Unmapped(hvp, generation))
        self.in_grace += len(hvps)
        m.obs.trace(Kind.FLUSH, vm=vm, a=generation, b=len(hvps))

    def advance_grace(self) -> None:
        """As far as the vCPUs have flushed, victims go to swap."""
        m = self._m
        for vm, queue in enumerate(self._unmapped):
            if not queue:
                continue
            oldest = m.memory.oldest_generation(vm, queue[-1].generation)
            while queue and queue[0].generation <= oldest:
                victim = queue.popleft()
                self.in_grace -= 1
                # Taken back meanwhile, and perhaps unmapped again under a later generation: that entry is further behind.
                if self._state[victim.hvp] == HPT_EVICT and self._generation[victim.hvp] == victim.generation:
                    m.page_out.evicted(victim.hvp)
