"""The vm machine: memslots, host page table, nested tables, and the get_user_pages ladder. Its other parts have files of their own.

The host page table (columns over host virtual pages, HPT_* states of host/kernels.py) is the truth; nested tables only cache it.

Invariants
* Nobody waits here: what cannot be answered now is a waiter in a table, answered by the event that makes it possible.
* The state of a page changes by an arrow of proto/lives.py only: in `VmMachine.move`, or in a kernel that is held to the same table.
* What is done after a batch is done in the order of `VmMachine.settle`: acknowledgements first, then those who wait, then reclaim.

The parts, all of which act on the columns that are kept here:

    host/frames.py       which frames are free, owned, lent, named by a write
    host/waiters.py      who waits for a page or a frame
    host/page_in.py      reads from swap
    host/reclaim.py      victims and their grace
    host/page_out.py     writes to swap, slots, pages that find none
    host/host_access.py  the host's own accesses: shared areas, images
    host/slot_change.py  memslots that change
    host/giveback.py     memory that guests give back
    host/shortage.py     when they have to

Deliberately not here: where swap slots lie and which daemon serves them (host/swap.py), who may fault asynchronously (host/x86.py), the
layout of guest memory (host/slots.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from host import kernels
from host.events import (
    Answer,
    CancelFetch,
    CancelPage,
    Fetch,
    Fetched,
    Found,
    FrameBack,
    GetPage,
    GuestRead32,
    GuestWrite32,
    Gup,
    LendFrame,
    LoadPage,
    LoadSlots,
    LookAtGrace,
    MemoryGiven,
    NoticeLost,
    ReadCancelled,
    ReleasePages,
    SavePage,
    SetMemslots,
    SlotsLost,
    SwapInDone,
    SwapOutDone,
    Translate,
    WritesStand,
)
from host.frames import Frames
from host.giveback import GiveBack
from host.host_access import HostAccess
from host.kernels import (
    F_DIRTY,
    F_STUCK,
    F_WRITEBACK,
    F_YOUNG,
    F_ZEROED,
    HPT_BAD,
    HPT_EVICT,
    HPT_NONE,
    HPT_READING,
    HPT_RESIDENT,
    HPT_SLOT,
    HPT_WRITING,
    HPT_ZERO,
)
from host.memory import VmPort
from host.observe import Observer
from host.page_in import PageIn
from host.page_out import PageOut
from host.reclaim import Reclaim
from host.shortage import Shortage
from host.slot_change import SlotChange
from host.slots import Memslot, Region, Slots
from host.waiters import Waiters
from proto.lives import PAGE
from proto.machine import Machine, MachineError, Path
from proto.stats import HostCounter

_NEEDS_FRAME: Final = -1
"""Internal rung: the page needs a frame and none is free."""


class Limits(NamedTuple):
    """Water marks in frames and the populate block in pages. ``reserve``: free frames that guests' faults leave alone; ``least``: with
    fewer frames than this that can change their page, memory is short.
    """

    low: int
    high: int
    populate_pages: int
    zero_pages: bool
    reserve: int = 0
    least: int = 1


class VmMachine(Machine):
    """Memory of all VMs of a run. See the module docstring."""

    def __init__(
        self,
        memory: VmPort,
        slots: Sequence[Memslot],
        limits: Limits,
        observer: Observer,
        regions: Sequence[Region] = (),
    ) -> None:
        super().__init__()
        self.memory = memory
        self.slots = Slots(slots, memory.vm_count, regions)
        self.limits = limits
        self.obs = observer
        self._columns(self.slots.host_pages)
        self._block_hvps = np.zeros(limits.populate_pages, np.int64)
        self._block_frames = np.zeros(limits.populate_pages, np.int64)
        self.frames = Frames(memory.frame_count, self.frame_of, limits.reserve)
        self.waiters = Waiters(self)
        self.page_in = PageIn(self)
        self.page_out = PageOut(self)
        self.reclaim = Reclaim(self)
        self.host_access = HostAccess(self)
        self.change = SlotChange(self)
        self.giveback = GiveBack(self)
        self.shortage = Shortage(self)
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            GetPage: self._get_page,
            Translate: self._translate,
            Fetch: self._fetch,
            CancelFetch: self.waiters.cancel_fetch,
            CancelPage: self.waiters.cancel_page,
            ReleasePages: self.giveback.release,
            MemoryGiven: self.shortage.given,
            NoticeLost: self.shortage.lost,
            GuestRead32: self.host_access.word,
            GuestWrite32: self.host_access.word,
            SwapInDone: self.page_in.done,
            LendFrame: self.page_in.lend,
            FrameBack: self.page_in.frame_back,
            SlotsLost: self.page_out.slots_lost,
            WritesStand: self.page_out.writes_stand,
            SwapOutDone: self.page_out.done,
            ReadCancelled: self.giveback.cancelled,
            LookAtGrace: lambda _: None,
            SavePage: self.host_access.save_page,
            LoadSlots: lambda event: self.slots.replace(event.slots),
            LoadPage: self.host_access.load_page,
            SetMemslots: self.change.set_memslots,
        }

    def _columns(self, pages: int) -> None:
        """Columns over pages, with memoryviews for single words (0.1 us instead of a kernel call)."""
        self.state = np.zeros(pages, np.uint8)
        self.frame_of = np.full(pages, -1, np.int32)
        self.slot_of = np.full(pages, -1, np.int64)
        self.flags = np.zeros(pages, np.uint8)
        self._state = self.state.data
        self._frame = self.frame_of.data
        self._slot = self.slot_of.data
        self._flags = self.flags.data

    # -- Machine -------------------------------------------------------------------------------------------
    def path_for(self, event: Any) -> Path | None:
        """Every event is handled at once; nothing here is interleaved with anything."""
        handler = self._handlers.get(type(event))
        if handler is None:
            raise MachineError(f"vm machine: unknown event {event!r}")
        handler(event)
        return None

    def settle(self) -> None:
        """After a batch: acknowledgements, freed frames for those who wait, reclaim below the low mark."""
        waiters, reclaim = self.waiters, self.reclaim
        if self.change.pending:
            self.change.advance()
        if reclaim.in_grace:
            reclaim.advance_grace()
        if self.giveback.pending:
            self.giveback.advance()
        if waiters.guests or waiters.urgent:
            waiters.feed()
        starving = waiters.guests or waiters.urgent
        if reclaim.under_way or starving or self.frames.free_count < self.limits.low:
            reclaim.look()
        if starving and self.page_out.swap_full:
            self.shortage.look()

    @property
    def grace_pending(self) -> bool:
        """Whether somebody waits for flush acknowledgements, or for victims that are too hot now: the shell looks again soon."""
        reclaim = self.reclaim
        return reclaim.in_grace > 0 or self.change.pending or self.giveback.pending or reclaim.found_none

    # -- the columns ---------------------------------------------------------------------------------------
    def move(self, hvp: int, event: str) -> None:
        """Take a page along an arrow of proto/lives.py PAGE. Raises MachineError."""
        self._state[hvp] = PAGE.go(self._state[hvp], event)

    def mark_dirty(self, hvp: int) -> None:
        """A cleared nested entry had its dirty bit, or there is no copy on swap any more."""
        self._flags[hvp] = (self._flags[hvp] | F_DIRTY) & ~F_ZEROED

    def forget_page(self, hvp: int) -> None:
        """The guest gave it back: as if it had never been touched."""
        self.move(hvp, "give_back")
        self._flags[hvp] = 0
        self._frame[hvp] = -1
        self._slot[hvp] = -1

    # -- memslots ------------------------------------------------------------------------------------------
    def find_hvp(self, vm: int, gfn: int) -> int:
        """Host virtual page of a gfn, -1 when no memslot backs it."""
        return self.slots.find(vm, gfn)

    def again(self, event: GetPage | Translate) -> None:
        """The layout that an event waited for is published."""
        if isinstance(event, GetPage):
            self._get_page(event, waited=True)
        else:
            self._translate(event, waited=True)

    def _translate(self, event: Translate, waited: bool = False) -> None:
        if self.change.hold(event):
            return
        hvp, generation = self.find_hvp(event.vm, event.gfn), self.slots.generation[event.vm]
        self.emit(Answer(event.cpu, event.ask, hvp, waited, hvp, generation))

    # -- the ladder ----------------------------------------------------------------------------------------
    def _get_page(self, event: GetPage, waited: bool = False) -> None:
        if self.change.hold(event):
            return
        self.shortage.heard(event.vm)
        hvp = self.find_hvp(event.vm, event.gfn)
        if hvp < 0:
            self.emit(Answer(event.cpu, event.ask, Found.NO_SLOT, waited))
            return
        found = self._map(event.vm, event.gfn, hvp, event.write, prefault=event.how is Gup.PREFAULT)
        if found == _NEEDS_FRAME or (found == Found.NEEDS_IO and event.how is Gup.WAIT):
            if event.how is Gup.PREFAULT:
                self.emit(Answer(event.cpu, event.ask, Found.NEEDS_IO, waited))
            else:
                self.waiters.wait(hvp, event)
            return
        self.emit(Answer(event.cpu, event.ask, found, waited, hvp))

    def came(self, hvp: int, event: GetPage) -> None:
        """The page that a vCPU waits for can be mapped, or zeroed as soon as there is a frame."""
        if self.find_hvp(event.vm, event.gfn) != hvp:
            # The layout changed meanwhile: this page is not what the guest would see there now.
            self._get_page(event, waited=True)
            return
        found = self._map(event.vm, event.gfn, hvp, event.write)
        if found in (_NEEDS_FRAME, Found.NEEDS_IO):
            self.waiters.wait(hvp, event)
            return
        if found in (Found.FAST, Found.SWAP_CACHE):
            found = Found.SWAPPED_IN
        self.emit(Answer(event.cpu, event.ask, found, True))

    def _map(self, vm: int, gfn: int, hvp: int, write: bool, prefault: bool = False) -> int:
        """Rungs one and two (spec §1.5, §1.6): map what needs no I/O. Returns a Found or _NEEDS_FRAME."""
        state = self._state[hvp]
        if state in (HPT_NONE, HPT_ZERO):
            return self._zero_fill(vm, gfn, hvp)
        if state in (HPT_SLOT, HPT_READING):
            return Found.NEEDS_IO
        if state == HPT_BAD:
            return Found.BAD
        taken_back = self.take_back(hvp, write)
        flags = self._flags[hvp]
        present, writable = self.memory.mapped(vm, gfn)
        if present and (writable or not write):
            return Found.FAST
        if not prefault:
            self._flags[hvp] = flags & ~F_YOUNG
        # Read-only while its write-back is under way: the first store must come here and cancel the slot.
        self.memory.map(vm, gfn, self._frame[hvp], not flags & F_WRITEBACK)
        return Found.SWAP_CACHE if taken_back or not present else Found.FAST

    def take_back(self, hvp: int, write: bool) -> bool:
        """A page on its way out becomes resident again; True when it was on its way out."""
        state = self._state[hvp]
        if state != HPT_RESIDENT:
            self.move(hvp, "take_back")
        if state == HPT_WRITING:
            self.page_out.taken_back(hvp)
        elif state == HPT_EVICT and self.page_out.stand:
            # Few pages can go then: it would be the next one to go again, before it was touched.
            self._flags[hvp] |= F_STUCK
        if write and self._flags[hvp] & F_WRITEBACK:
            self.page_out.overwritten(hvp)
        return state != HPT_RESIDENT

    def _zero_fill(self, vm: int, gfn: int, hvp: int) -> int:
        frames, block = self.frames, self.limits.populate_pages
        if frames.short(urgent=False):
            return _NEEDS_FRAME
        fresh = self._state[hvp] == HPT_NONE
        if fresh and block > 1 and frames.free_count > self.limits.low + block:
            first, count = self._block_around(vm, gfn, hvp, block)
            frames.free_count, taken = kernels.take_block(
                self.state, self.frame_of, self.flags, frames.owner, frames.free, frames.free_count, first, count,
                self._block_hvps, self._block_frames,
            )  # fmt: skip
            self.memory.map_zeroed(vm, self._block_hvps[:taken], self._block_frames[:taken], gfn - hvp)
            return Found.ZERO_FILL
        self.memory.map(vm, gfn, self.fill_with_zeros(hvp), True)
        if not fresh:
            self.obs.count(HostCounter.ZERO_IN)
        return Found.ZERO_FILL

    def fill_with_zeros(self, hvp: int) -> int:
        """A page without contents gets a frame, which is returned. Raises MachineError when none is free."""
        frame = self.frames.take(hvp)
        self.memory.zero(frame)
        self.move(hvp, "zero_fill")
        self._flags[hvp] = F_ZEROED
        return frame

    def _block_around(self, vm: int, gfn: int, hvp: int, block: int) -> tuple[int, int]:
        """The aligned block of pages around ``hvp`` inside the memslot of ``gfn``."""
        s = self.slots.slot_of(vm, gfn)
        if s is None:
            raise MachineError(f"gfn {gfn} of VM {vm} is in no memslot")
        first = max(s.base_hvp, hvp - hvp % block)
        return first, min(first - first % block + block, s.base_hvp + s.pages) - first

    # -- async fetch (the worker's part) -------------------------------------------------------------------
    def _fetch(self, event: Fetch) -> None:
        hvp = event.hvp
        state = self._state[hvp]
        if state in (HPT_SLOT, HPT_READING):
            self.waiters.wait(hvp, event)
            return
        if state in (HPT_EVICT, HPT_WRITING):
            self.take_back(hvp, write=False)
        if state != HPT_BAD:
            self._flags[hvp] |= F_YOUNG
        self.emit(Fetched(event.cpu, event.work))
