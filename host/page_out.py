"""Pages that go to swap, once nobody can reach them: dropped or written, and the slots they have. Part of the vm machine.

Invariants
* A page that is written keeps its frame until the write was acknowledged; a fault takes it back until then.
* A store before the acknowledgement makes the slot's contents stale: slot and frame stay named by the request, and are free when it is
  answered.
* When swap is full, pages that found no slot are stuck (F_STUCK): reclaim passes them over and goes on with those that have one. Each
  slot that comes back lets one of them try again.
* While no daemon takes writes, pages that would have to be written are stuck, too, and those that need no write are dropped: whoever needs
  a frame and no page from swap goes on. When a daemon is back, all of them may try again.

Not handled here: which pages go and when nobody reaches them (host/reclaim.py), where slots lie (host/swap.py), what happens when no
frame can change its page any more (host/shortage.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from host.events import PagesLost, SlotFree, SlotsLost, SwapOut, SwapOutDone, WritesStand
from host.kernels import F_DIRTY, F_STUCK, F_WRITEBACK, F_YOUNG, F_ZEROED, HPT_READING, HPT_SLOT, HPT_WRITING
from proto.stats import HostCounter
from proto.trace import Kind

if TYPE_CHECKING:
    from host.vm import VmMachine


class PageOut:
    """Writes of all pages, from the end of the grace to the free frame."""

    __slots__ = (
        "_flags",
        "_frame",
        "_m",
        "_serial",
        "_slot",
        "_state",
        "_writes",
        "coming",
        "stand",
        "swap_full",
    )

    def __init__(self, machine: VmMachine) -> None:
        self._m = machine
        self._state = machine.state.data
        self._frame = machine.frame_of.data
        self._slot = machine.slot_of.data
        self._flags = machine.flags.data
        self._writes: dict[int, int] = {}
        """Page -> serial number of its write under way."""
        self._serial = 0
        self.coming = 0
        """Frames that will be free when writes under way are acknowledged, unless their pages are taken back: pages in WRITING."""
        self.swap_full = False
        self.stand = False
        """No daemon takes writes."""

    def evicted(self, hvp: int) -> None:
        """Nobody translates to this page any more: its contents and its dirty bit are final."""
        m = self._m
        frame, slot, flags = self._frame[hvp], self._slot[hvp], self._flags[hvp]
        if not flags & F_DIRTY and slot >= 0:
            m.obs.count(HostCounter.CLEAN_DROPS)
            self._drop(hvp, "drop_clean")
        elif not flags & F_DIRTY and flags & F_ZEROED:
            self._drop(hvp, "drop_untouched")
        elif m.limits.zero_pages and m.memory.is_zero(frame):
            m.obs.count(HostCounter.ZERO_OUT)
            if slot >= 0:
                self._slot[hvp] = -1
                self.free_slot(slot)
            self._drop(hvp, "drop_zero")
        elif self.stand:
            m.move(hvp, "keep")
            self._flags[hvp] = flags | F_DIRTY | F_STUCK
        else:
            m.move(hvp, "write")
            self.coming += 1
            self._serial += 1
            self._writes[hvp] = self._serial
            m.obs.trace(Kind.SWAP_OUT, a=hvp, b=slot & 0xFFFF_FFFF_FFFF_FFFF, c=frame)
            m.emit(SwapOut(self._serial, hvp, frame, slot, m.memory.checksum(frame)))

    def _drop(self, hvp: int, why: str) -> None:
        frame = self._frame[hvp]
        self._m.move(hvp, why)
        self._flags[hvp] = 0
        self._frame[hvp] = -1
        self._m.frames.give(frame)

    # -- a write is answered -------------------------------------------------------------------------------
    def done(self, event: SwapOutDone) -> None:
        """The answer to a write, be it cancelled meanwhile."""
        m = self._m
        hvp = event.hvp
        if self._writes.get(hvp) != event.serial:
            self._stale(event)
            return
        del self._writes[hvp]
        if self._state[hvp] == HPT_WRITING:
            self.coming -= 1
        if not event.ok:
            self._failed(event)
            return
        m.obs.count(HostCounter.SWAP_OUT_PAGES)
        m.obs.trace(Kind.SWAP_OUT_DONE, a=hvp, b=event.slot, c=event.frame)
        self._slot[hvp] = event.slot
        if self._state[hvp] == HPT_WRITING:
            self._drop(hvp, "written")
        else:
            # Taken back and only read since: clean, with a valid slot. Its nested entry stays read-only until the next store,
            # which faults once and finds nothing to cancel.
            self._flags[hvp] &= ~(F_WRITEBACK | F_DIRTY)

    def _stale(self, event: SwapOutDone) -> None:
        """Answer to a cancelled write: only now may its slot and its frame be used again."""
        if event.slot >= 0:
            self.free_slot(event.slot)
        elif not event.full:
            # A write that failed has given its slot back already.
            self.unstick()
        self._m.frames.unpin(event.serial)

    def _failed(self, event: SwapOutDone) -> None:
        """The page stays in memory, dirty. When there was no slot, reclaim leaves it alone until one comes back."""
        hvp = event.hvp
        self._slot[hvp] = -1
        if self._state[hvp] == HPT_WRITING:
            self._m.move(hvp, "keep")
        self._flags[hvp] = (self._flags[hvp] | F_DIRTY | F_YOUNG) & ~F_WRITEBACK
        if event.full:
            self.swap_full = True
            self._flags[hvp] |= F_STUCK
        else:
            self.unstick()

    # -- a write is cancelled ------------------------------------------------------------------------------
    def taken_back(self, hvp: int) -> None:
        """A page in WRITING is resident again, and the write goes on."""
        self.coming -= 1
        self._flags[hvp] |= F_WRITEBACK

    def overwritten(self, hvp: int) -> None:
        """A store came before the acknowledgement, to a page that has a write under way."""
        self._m.frames.pin(self._writes.pop(hvp), self._frame[hvp])
        self._slot[hvp] = -1
        self._flags[hvp] = (self._flags[hvp] | F_DIRTY) & ~F_WRITEBACK
        self._m.obs.count(HostCounter.WRITEBACK_CANCELLED)

    def given_up(self, hvp: int) -> bool:
        """The page of a write under way is given back: frame and slot are free when it is answered. False: there is no such write."""
        if hvp not in self._writes:
            return False
        if self._state[hvp] == HPT_WRITING:
            self.coming -= 1
        self._m.frames.pin(self._writes.pop(hvp), self._frame[hvp])
        return True

    # -- slots ---------------------------------------------------------------------------------------------
    def free_slot(self, slot: int) -> None:
        """Nobody needs what is in a slot, and no request names it."""
        self.unstick()
        self._m.emit(SlotFree(slot))

    def unstick(self) -> None:
        """A slot came back: one of the pages that found none may try again."""
        if self.swap_full:
            flags = self._m.flags
            stuck = np.flatnonzero(flags & F_STUCK)
            if len(stuck):
                flags[stuck[0]] &= 255 - F_STUCK
            self.swap_full = len(stuck) > 1

    def writes_stand(self, event: WritesStand) -> None:
        """See the events."""
        self.stand = event.stand
        if not event.stand:
            self._m.flags[:] &= 255 - F_STUCK
            self.swap_full = False

    @property
    def stuck(self) -> int:
        """Frames that cannot change their page as long as no slot is free."""
        return int(np.count_nonzero(self._m.flags & F_STUCK)) if self.swap_full else 0

    @property
    def slots_coming(self) -> int:
        """Slots that will be free when writes under way are answered: their pages were written to or given back meanwhile."""
        return len(self._m.frames.pinned)

    def slots_lost(self, event: SlotsLost) -> None:
        """Pages that are in memory are dirty from now on; one that was only there ends the run."""
        m, pages = self._m, 0
        for hvp in np.flatnonzero(np.isin(m.slot_of, np.array(event.slots, np.int64))).tolist():
            if self._state[hvp] in (HPT_SLOT, HPT_READING):
                pages += 1
            elif hvp not in self._writes:
                self._slot[hvp] = -1
                m.mark_dirty(hvp)
        if pages or event.fatal:
            m.emit(PagesLost(event.daemon, pages))
