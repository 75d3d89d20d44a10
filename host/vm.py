"""The vm machine: memslots, host page table, nested tables, the get_user_pages ladder and reclaim.

The host page table (columns over host virtual pages, HPT_* states of host/kernels.py) is the truth; nested tables only cache it.

Invariants
* A frame is in exactly one place: the free stack, owned by a page, held for an unanswered write that names it (``_pinned``), or lent to
  the swap machine for a further read of a page (``lent``).
* A page leaves a nested table in this order: clear the entry, bump the flush generation, wait for every vCPU of the VM to
  acknowledge or to be outside guest mode, checksum, write. Its frame is free only after the write was acknowledged (or, clean,
  after the grace). Until then a fault takes the page back.
* Nobody waits here: what cannot be answered now is a waiter in a table, answered by the event that makes it possible.
* A page in READING has one read under way however many wait for it.
* The last ``Limits.reserve`` frames are for the host's own accesses, so that these wait for I/O at most, never for a guest.

When swap is full, reclaim passes pages without a slot over (F_STUCK) and goes on with those that have one.

Deliberately not here: where swap slots lie and which daemon serves them (host/swap.py), who may fault asynchronously (host/x86.py), the
layout of guest memory (host/slots.py) and its changes (host/slot_change.py), memory that guests give back (host/giveback.py), when they
have to (host/shortage.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from host import kernels
from host.events import (
    STALE,
    Answer,
    CancelFetch,
    CancelPage,
    Fetch,
    Fetched,
    Found,
    FrameBack,
    FrameLent,
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
    PageLoaded,
    PageSaved,
    PagesLost,
    ReadCancelled,
    ReleasePages,
    SavePage,
    SetMemslots,
    SlotFree,
    SlotsLost,
    SwapIn,
    SwapInBad,
    SwapInDone,
    SwapOut,
    SwapOutDone,
    Translate,
)
from host.giveback import GiveBack
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
from host.shortage import Shortage
from host.slot_change import SlotChange
from host.slots import UNMAPPED, Memslot, Range, Region, Slots
from proto.image import Content
from proto.layout import NPT_D
from proto.lives import PAGE
from proto.machine import Machine, MachineError, Path
from proto.stats import HostCounter
from proto.trace import Kind
from proto.units import FLUSH_BATCH, PAGE_SIZE

_NEEDS_FRAME: Final = -1
"""Internal rung: the page needs a frame and none is free."""


_CONTENT: Final = {HPT_NONE: Content.NONE, HPT_ZERO: Content.ZERO, HPT_BAD: Content.BAD}
"""Pages without contents, as images call them."""
_LOADS: Final = {Content.DATA: "load", Content.ZERO: "load_zero", Content.BAD: "load_bad"}
"""What loading a page is called in its table; a page that was never touched stays so."""


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


class _Unmapped(NamedTuple):
    """A victim between unmapping and the end of its grace period."""

    hvp: int
    generation: int


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
        self.change = SlotChange(self)
        self.giveback = GiveBack(self)
        self.shortage = Shortage(self)
        self.limits = limits
        self.obs = observer
        self._columns(self.slots.host_pages, memory.frame_count)
        self._waiters: dict[int, list[Any]] = {}
        self._frame_waiters: deque[int] = deque()
        self._urgent: deque[int] = deque()
        """Pages that the host itself needs a frame for, when even the reserve was used up."""
        self._unmapped: list[deque[_Unmapped]] = [deque() for _ in range(memory.vm_count)]
        self._hands: dict[Range, int] = {}
        self._next_range = 0
        self._writes: dict[int, int] = {}
        self._serial = 0
        self._pinned: dict[int, int] = {}
        self._limbo: set[int] = set()
        self.lent: set[int] = set()
        self._evicting = 0
        self._reclaiming = False
        self._found_none = False
        """Somebody waits for a frame, and every page was too hot to be a victim just now."""
        self.swap_full = False
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            GetPage: self._get_page,
            Translate: self._translate,
            Fetch: self._fetch,
            CancelFetch: self._cancel_fetch,
            CancelPage: self._cancel_page,
            ReleasePages: self.giveback.release,
            MemoryGiven: self.shortage.given,
            NoticeLost: self.shortage.lost,
            GuestRead32: self._guest_access,
            GuestWrite32: self._guest_access,
            SwapInDone: self._swap_in_done,
            LendFrame: self._lend_frame,
            FrameBack: self.frame_back,
            SlotsLost: self._slots_lost,
            SwapOutDone: self._swap_out_done,
            ReadCancelled: self.giveback.cancelled,
            LookAtGrace: lambda _: None,
            SavePage: self._save_page,
            LoadSlots: lambda event: self.slots.replace(event.slots),
            LoadPage: self._load_page,
            SetMemslots: self.change.set_memslots,
        }

    def _columns(self, pages: int, frames: int) -> None:
        """Columns over pages and frames, with memoryviews for single words (0.1 us instead of a kernel call)."""
        self.state = np.zeros(pages, np.uint8)
        self.frame_of = np.full(pages, -1, np.int32)
        self.slot_of = np.full(pages, -1, np.int64)
        self.flags = np.zeros(pages, np.uint8)
        self.owner = np.full(frames, -1, np.int32)
        self.free = np.arange(frames - 1, -1, -1, dtype=np.int32)
        self.free_count = frames
        self._victims = np.zeros(FLUSH_BATCH, np.int64)
        self._block_hvps = np.zeros(self.limits.populate_pages, np.int64)
        self._block_frames = np.zeros(self.limits.populate_pages, np.int64)
        self._unmap_gen = np.zeros(pages, np.int64).data
        self._state = self.state.data
        self._frame = self.frame_of.data
        self._slot = self.slot_of.data
        self._flags = self.flags.data
        self._owner = self.owner.data
        self._free = self.free.data

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
        if self.change.pending:
            self.change.advance()
        if self._evicting:
            self._advance_grace()
        if self.giveback.pending:
            self.giveback.advance()
        if self._frame_waiters or self._urgent:
            self._feed_frame_waiters()
        if self._reclaiming or self.free_count < self.limits.low or self.starving:
            self._reclaim()
        if self.swap_full and self.starving:
            self.shortage.look()

    @property
    def grace_pending(self) -> bool:
        """Whether somebody waits for flush acknowledgements, or for victims that are too hot now: the shell looks again soon."""
        return self._evicting > 0 or self.change.pending or self.giveback.pending or self._found_none

    @property
    def starving(self) -> int:
        """How many pages wait for a frame."""
        return len(self._frame_waiters) + len(self._urgent)

    def starved(self, *, urgent: bool) -> list[Any]:
        """Who waits for those pages, of the guests or of the host itself. Nobody, where who waited was reset meanwhile."""
        queue = self._urgent if urgent else self._frame_waiters
        return [event for hvp in queue for event in self._waiters.get(hvp, ())]

    def _move(self, hvp: int, event: str) -> None:
        """Take a page along an arrow of proto/lives.py PAGE. Raises MachineError."""
        self._state[hvp] = PAGE.go(self._state[hvp], event)

    # -- memslots ------------------------------------------------------------------------------------------
    def find_hvp(self, vm: int, gfn: int) -> int:
        """Host virtual page of a gfn, -1 when no memslot backs it."""
        return self.slots.find(vm, gfn)

    def mark_dirty(self, hvp: int) -> None:
        """A cleared nested entry had its dirty bit."""
        self._flags[hvp] = (self._flags[hvp] | F_DIRTY) & ~F_ZEROED

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
                self._wait_for(hvp, event)
            return
        self.emit(Answer(event.cpu, event.ask, found, waited, hvp))

    def _map(self, vm: int, gfn: int, hvp: int, write: bool, prefault: bool = False) -> int:
        """Rungs one and two (spec §1.5, §1.6): map what needs no I/O. Returns a Found or _NEEDS_FRAME."""
        state = self._state[hvp]
        if state in (HPT_NONE, HPT_ZERO):
            return self._zero_fill(vm, gfn, hvp)
        if state in (HPT_SLOT, HPT_READING):
            return Found.NEEDS_IO
        if state == HPT_BAD:
            return Found.BAD
        taken_back = self._take_back(hvp, write)
        flags = self._flags[hvp]
        present, writable = self.memory.mapped(vm, gfn)
        if present and (writable or not write):
            return Found.FAST
        if not prefault:
            self._flags[hvp] = flags & ~F_YOUNG
        # Read-only while its write-back is under way: the first store must come here and cancel the slot.
        self.memory.map(vm, gfn, self._frame[hvp], not flags & F_WRITEBACK)
        return Found.SWAP_CACHE if taken_back or not present else Found.FAST

    def _take_back(self, hvp: int, write: bool) -> bool:
        """A page on its way out becomes resident again; True when it was on its way out."""
        state = self._state[hvp]
        if state != HPT_RESIDENT:
            self._move(hvp, "take_back")
        if state == HPT_WRITING:
            self._flags[hvp] |= F_WRITEBACK
        if write and self._flags[hvp] & F_WRITEBACK:
            self._cancel_write(hvp)
        return state != HPT_RESIDENT

    def _cancel_write(self, hvp: int) -> None:
        """A store came before the acknowledgement: the slot's contents are stale, the slot and the frame stay named by the request."""
        serial = self._writes.pop(hvp)
        self._pinned[serial] = self._frame[hvp]
        self._slot[hvp] = -1
        self._flags[hvp] = (self._flags[hvp] | F_DIRTY) & ~F_WRITEBACK
        self.obs.count(HostCounter.WRITEBACK_CANCELLED)

    def _zero_fill(self, vm: int, gfn: int, hvp: int) -> int:
        if self.free_count <= self.limits.reserve:
            return _NEEDS_FRAME
        fresh = self._state[hvp] == HPT_NONE
        block = self.limits.populate_pages
        if fresh and block > 1 and self.free_count > self.limits.low + block:
            first, count = self._block_around(vm, gfn, hvp, block)
            self.free_count, taken = kernels.take_block(
                self.state, self.frame_of, self.flags, self.owner, self.free, self.free_count, first, count,
                self._block_hvps, self._block_frames,
            )  # fmt: skip
            self.memory.map_zeroed(vm, self._block_hvps[:taken], self._block_frames[:taken], gfn - hvp)
            return Found.ZERO_FILL
        frame = self._take_frame(hvp)
        self.memory.zero(frame)
        self._move(hvp, "zero_fill")
        self._flags[hvp] = F_ZEROED
        self.memory.map(vm, gfn, frame, True)
        if not fresh:
            self.obs.count(HostCounter.ZERO_IN)
        return Found.ZERO_FILL

    def _block_around(self, vm: int, gfn: int, hvp: int, block: int) -> tuple[int, int]:
        """The aligned block of pages around ``hvp`` inside the memslot of ``gfn``."""
        s = self.slots.slot_of(vm, gfn)
        if s is None:
            raise MachineError(f"gfn {gfn} of VM {vm} is in no memslot")
        first = max(s.base_hvp, hvp - hvp % block)
        return first, min(first - first % block + block, s.base_hvp + s.pages) - first

    # -- waiting for pages and frames ----------------------------------------------------------------------
    def _wait_for(self, hvp: int, event: Any, urgent: bool = False) -> None:
        """``urgent``: the host itself needs the page, so the reserve is for it."""
        self._waiters.setdefault(hvp, []).append(event)
        if self._state[hvp] == HPT_SLOT:
            self._move(hvp, "want")
            self._frame[hvp] = -1
            self._read(hvp, urgent)
        elif self._state[hvp] != HPT_READING:
            self._wait_for_frame(hvp, urgent)
        elif urgent and self._frame[hvp] < 0:
            self._read(hvp, urgent)

    def _wait_for_frame(self, hvp: int, urgent: bool) -> None:
        self.obs.count(HostCounter.FRAME_WAITS)
        (self._urgent if urgent else self._frame_waiters).append(hvp)

    def _read(self, hvp: int, urgent: bool = False) -> None:
        """Start the read of a page in READING, or queue for a landing frame."""
        if self.free_count <= (0 if urgent else self.limits.reserve):
            self._wait_for_frame(hvp, urgent)
            return
        frame = self._take_frame(hvp)
        self.obs.trace(Kind.SWAP_IN, a=hvp, b=self._slot[hvp], c=frame)
        self.emit(SwapIn(hvp, self._slot[hvp], frame))

    def _cancel_page(self, event: CancelPage) -> None:
        """The page goes on coming; the vCPU will fault on it again."""
        for hvp, waiters in self._waiters.items():
            for waiter in waiters:
                if type(waiter) is GetPage and (waiter.cpu, waiter.ask) == (event.cpu, event.ask):
                    waiters.remove(waiter)
                    self._forget_waiter(hvp, waiters)
                    self.emit(Answer(event.cpu, event.ask, Found.NO_MEMORY, True, hvp))
                    return
        if self.change.cancel(event):
            self.emit(Answer(event.cpu, event.ask, Found.NO_MEMORY, True))

    def _forget_waiter(self, hvp: int, waiters: list[Any]) -> None:
        """A page that nobody wants any more does not queue for a frame. A read keeps its place: who asks again finds it READING."""
        if not waiters:
            del self._waiters[hvp]
            if self._state[hvp] != HPT_READING:
                for queue in (self._frame_waiters, self._urgent):
                    while hvp in queue:
                        queue.remove(hvp)

    def serve(self, hvp: int) -> None:
        """Answer everybody who waits for a page that can be mapped now."""
        for event in self._waiters.pop(hvp, ()):
            if type(event) is GetPage:
                if self.find_hvp(event.vm, event.gfn) != hvp:
                    # The layout changed meanwhile: this page is not what the guest would see there now.
                    self._get_page(event, waited=True)
                    continue
                found = self._map(event.vm, event.gfn, hvp, event.write)
                if found in (_NEEDS_FRAME, Found.NEEDS_IO):
                    self._wait_for(hvp, event)
                    continue
                if found in (Found.FAST, Found.SWAP_CACHE):
                    found = Found.SWAPPED_IN
                self.emit(Answer(event.cpu, event.ask, found, True))
            elif type(event) is Fetch:
                self.emit(Fetched(event.cpu, event.work))
            elif type(event) is SavePage:
                self._save_page(event)
            elif type(event) is LoadPage:
                self._load_page(event)
            else:
                self._guest_access(event, waited=True)

    # -- async fetch (the worker's part) -------------------------------------------------------------------
    def _fetch(self, event: Fetch) -> None:
        hvp = event.hvp
        state = self._state[hvp]
        if state in (HPT_SLOT, HPT_READING):
            self._wait_for(hvp, event)
            return
        if state in (HPT_EVICT, HPT_WRITING):
            self._take_back(hvp, write=False)
        if state != HPT_BAD:
            self._flags[hvp] |= F_YOUNG
        self.emit(Fetched(event.cpu, event.work))

    def _cancel_fetch(self, event: CancelFetch) -> None:
        """The read goes on (its frame is named by a request); only the answer is not wanted any more."""
        waiters = self._waiters.get(event.hvp)
        if waiters is not None:
            waiters[:] = [
                w for w in waiters if not (type(w) is Fetch and (w.cpu, w.work) == (event.cpu, event.work))
            ]

    # -- host access to guest memory -----------------------------------------------------------------------
    def _guest_access(self, event: GuestRead32 | GuestWrite32, waited: bool = False) -> None:
        """The shared area goes up the same ladder as the guest; on a miss the asking vCPU is held (nothing is pinned in secret).

        The caller brings the translation it remembers; it is good while the generation of the slots is the one it was made with.
        """
        hvp, generation = event.hvp, self.slots.generation[event.vm]
        write = type(event) is GuestWrite32
        if event.generation != generation:
            self.emit(Answer(event.cpu, event.ask, STALE, waited, generation=generation))
            return
        if hvp < 0 or self._state[hvp] == HPT_BAD:
            self.emit(Answer(event.cpu, event.ask, 0 if write else -1, waited, hvp, generation))
            return
        if self._state[hvp] in (HPT_NONE, HPT_ZERO):
            if self.free_count == 0:
                self._wait_for(hvp, event, urgent=True)
                return
            frame = self._take_frame(hvp)
            self.memory.zero(frame)
            self._move(hvp, "zero_fill")
            self._flags[hvp] = F_ZEROED
        elif self._state[hvp] in (HPT_SLOT, HPT_READING):
            self._wait_for(hvp, event, urgent=True)
            return
        else:
            self._take_back(hvp, write)
        offset = event.gpa & (PAGE_SIZE - 1)
        if isinstance(event, GuestWrite32):
            old = self.memory.read32(self._frame[hvp], offset)
            self.memory.write32(self._frame[hvp], offset, event.value)
            self._flags[hvp] = (self._flags[hvp] | F_DIRTY | F_YOUNG) & ~F_ZEROED
            dirty = bool(self._flags[hvp] & F_DIRTY)
            self.emit(Answer(event.cpu, event.ask, 1 + old, waited, hvp, generation, dirty))
        else:
            word = self.memory.read32(self._frame[hvp], offset)
            self.emit(Answer(event.cpu, event.ask, word, waited, hvp, generation))

    # -- images --------------------------------------------------------------------------------------------
    def _save_page(self, event: SavePage) -> None:
        """No vCPU runs. The page is read like any other and is not kept from being reclaimed again: what leaves is a copy."""
        hvp = event.hvp
        state = self._state[hvp]
        if state in (HPT_SLOT, HPT_READING):
            self._wait_for(hvp, event, urgent=True)
        elif state in _CONTENT:
            self.emit(PageSaved(hvp, _CONTENT[state], b""))
        elif self.limits.zero_pages and self.memory.is_zero(self._frame[hvp]):
            self.emit(PageSaved(hvp, Content.ZERO, b""))
        else:
            self.emit(PageSaved(hvp, Content.DATA, bytes(self.memory.page(self._frame[hvp]))))

    def _load_page(self, event: LoadPage) -> None:
        """Into a fresh host: resident and dirty, so that reclaim finds it like a page that a guest wrote."""
        hvp, content = event.hvp, event.content
        if self._state[hvp] != HPT_NONE:
            raise MachineError(
                f"page {hvp} of an image goes where something is already (state {self._state[hvp]})"
            )
        if content is Content.DATA:
            if self.free_count == 0:
                self._wait_for(hvp, event, urgent=True)
                return
            self.memory.write_page(self._take_frame(hvp), event.data)
            self._flags[hvp] = F_DIRTY
        if content in _LOADS:
            self._move(hvp, _LOADS[content])
        self.emit(PageLoaded(hvp))

    # -- swap-in -------------------------------------------------------------------------------------------
    def _swap_in_done(self, event: SwapInDone) -> None:
        hvp, frame = event.hvp, event.frame
        if self.giveback.landed(event):
            return
        if self._state[hvp] != HPT_READING or (self._frame[hvp] != frame and frame not in self.lent):
            raise MachineError(
                f"swap-in of page {hvp} into frame {frame}, which is in state {self._state[hvp]}"
            )
        if self._frame[hvp] != frame:
            self._exchange(hvp, frame)
        if not event.ok:
            self._poison(hvp)
            return
        if self.memory.checksum(frame) != event.xxh3:
            # Its reply has come, so nothing else lands in this frame.
            self.obs.count(HostCounter.CHECKSUM_ERRORS)
            self.emit(SwapInBad(hvp, event.slot, frame, event.copy))
            return
        self.obs.trace(Kind.SWAP_IN_DONE, a=hvp, b=event.slot, c=frame)
        self.obs.count(HostCounter.SWAP_IN_PAGES)
        self._move(hvp, "arrive")
        self._flags[hvp] = F_YOUNG
        if event.rewrite:
            self.obs.count(HostCounter.REWRITTEN)
            self._flags[hvp] |= F_DIRTY
            self._slot[hvp] = -1
            self.free_slot(event.slot)
        self.serve(hvp)

    def _poison(self, hvp: int) -> None:
        """No copy can be read: the page is lost, and whoever touches it gets a machine check."""
        self.obs.count(HostCounter.IO_ERRORS)
        frame, slot = self._frame[hvp], self._slot[hvp]
        self._move(hvp, "poison")
        self._frame[hvp] = self._slot[hvp] = -1
        self.emit(SlotFree(slot))
        self.give_frame(frame)
        self.serve(hvp)

    # -- further reads of a page -----------------------------------------------------------------------------
    def _lend_frame(self, event: LendFrame) -> None:
        """A landing frame for a second read; none for a page that nobody reads any more, and none that reclaim would have to replace."""
        frame = -1
        spare = self.free_count > max(self.limits.reserve, self.limits.low) and not self.starving
        if self._state[event.hvp] == HPT_READING and spare:
            self.free_count -= 1
            frame = self._free[self.free_count]
            self.lent.add(frame)
        self.emit(FrameLent(event.hvp, frame))

    def lend(self, frame: int) -> None:
        """A frame that a read may land in, and that no page owns any more."""
        self.lent.add(frame)
        self._owner[frame] = -1

    def _exchange(self, hvp: int, frame: int) -> None:
        """The page came in a lent frame; the one that was meant for it stays lent until nothing can land there."""
        own = self._frame[hvp]
        self.lent.remove(frame)
        self.lend(own)
        self._owner[frame] = hvp
        self._frame[hvp] = frame

    def frame_back(self, event: FrameBack) -> None:
        """Nothing can land in a lent frame any more: it is free."""
        if event.frame not in self.lent:
            raise MachineError(f"frame {event.frame} comes back and was not lent")
        self.lent.remove(event.frame)
        self._push_free(event.frame)
        # The block that its request named may be free now as well.
        self._unstick()

    def _slots_lost(self, event: SlotsLost) -> None:
        """Pages that are in memory are dirty from now on; one that was only there ends the run."""
        pages = 0
        for hvp in np.flatnonzero(np.isin(self.slot_of, np.array(event.slots, np.int64))).tolist():
            if self._state[hvp] in (HPT_SLOT, HPT_READING):
                pages += 1
            elif hvp not in self._writes:
                self._slot[hvp] = -1
                self._flags[hvp] = (self._flags[hvp] | F_DIRTY) & ~F_ZEROED
        if pages or event.fatal:
            self.emit(PagesLost(event.daemon, pages))

    # -- reclaim -------------------------------------------------------------------------------------------
    def _reclaim(self) -> None:
        """Below the low mark unmap batches until the frames on their way plus the free ones reach the high mark."""
        self._found_none = False
        if self.shortage.open or (self.swap_full and not self.starving):
            # What is short now comes from a guest; and where nobody waits, more attempts would only find that there is no slot.
            self._reclaiming = False
            return
        if self.free_count < self.limits.low or self.starving:
            self._reclaiming = True
        while self._reclaiming:
            coming = self._evicting + len(self._writes)
            missing = self.limits.high - self.free_count - coming
            if missing <= 0:
                self._reclaiming = self.free_count < self.limits.high
                return
            if self._unmap_batch(min(missing, FLUSH_BATCH)) == 0:
                self._found_none = self.starving > 0 and coming == 0 and self._evictable()
                return

    def _evictable(self) -> bool:
        """Whether some page is only too hot to be a victim."""
        return bool(np.any((self.state == HPT_RESIDENT) & (self.flags & (F_WRITEBACK | F_STUCK) == 0)))

    def _unmap_batch(self, want: int) -> int:
        """One flush generation: victims from the host's memory, range by range; returns how many."""
        ranges = self.slots.ranges
        for _ in range(len(ranges)):
            part = ranges[self._next_range % len(ranges)]
            self._next_range = (self._next_range + 1) % len(ranges)
            found = self._victims_in(part, want)
            if found:
                victims = self._victims[:found].tolist()
                if self.slots.aliased:
                    self._unmap_aliases(part, victims)
                self._begin_grace(part.vm, victims)
                return found
        return 0

    def _victims_in(self, part: Range, want: int) -> int:
        """Victims of one range into ``_victims``; returns how many."""
        hand = self._hands.get(part, 0)
        if part.first_gfn != UNMAPPED:
            hand, found = self.memory.pick_victims(
                part.vm,
                self.state,
                self.flags,
                part.first_hvp,
                part.pages,
                part.first_gfn,
                hand,
                want,
                self._victims,
            )
        elif self.change.moving:
            return 0
        else:
            hand, found = kernels.pick_unmapped(
                self.state, self.flags, part.first_hvp, part.pages, hand, want, self._victims
            )
        self._hands[part] = int(hand)
        return int(found)

    def _unmap_aliases(self, part: Range, victims: list[int]) -> None:
        """The other guest frames of pages that are mapped more than once."""
        for hvp in victims:
            for gfn in self.slots.gfns_of(part.vm, hvp):
                if self.memory.unmap(part.vm, gfn) & NPT_D:
                    self.mark_dirty(hvp)

    def _begin_grace(self, vm: int, hvps: list[int]) -> None:
        generation = self.memory.bump_generation(vm)
        self.obs.count(HostCounter.FLUSHES)
        queue = self._unmapped[vm]
        for hvp in hvps:
            self._unmap_gen[hvp] = generation
            queue.append(_Unmapped(hvp, generation))
        self._evicting += len(hvps)
        self.obs.trace(Kind.FLUSH, vm=vm, a=generation, b=len(hvps))

    def _advance_grace(self) -> None:
        for vm, queue in enumerate(self._unmapped):
            if not queue:
                continue
            oldest = self.memory.oldest_generation(vm, queue[-1].generation)
            while queue and queue[0].generation <= oldest:
                victim = queue.popleft()
                self._evicting -= 1
                # Taken back meanwhile, and perhaps unmapped again under a later generation: that entry is further behind.
                if self._state[victim.hvp] == HPT_EVICT and self._unmap_gen[victim.hvp] == victim.generation:
                    self._evicted(victim.hvp)

    def _evicted(self, hvp: int) -> None:
        """Nobody translates to this page any more: its contents and its dirty bit are final."""
        frame, slot, flags = self._frame[hvp], self._slot[hvp], self._flags[hvp]
        if not flags & F_DIRTY and slot >= 0:
            self.obs.count(HostCounter.CLEAN_DROPS)
            self._drop(hvp, "drop_clean")
        elif not flags & F_DIRTY and flags & F_ZEROED:
            self._drop(hvp, "drop_untouched")
        elif self.limits.zero_pages and self.memory.is_zero(frame):
            self.obs.count(HostCounter.ZERO_OUT)
            if slot >= 0:
                self._slot[hvp] = -1
                self.free_slot(slot)
            self._drop(hvp, "drop_zero")
        else:
            self._move(hvp, "write")
            self._serial += 1
            self._writes[hvp] = self._serial
            self.obs.trace(Kind.SWAP_OUT, a=hvp, b=slot & 0xFFFF_FFFF_FFFF_FFFF, c=frame)
            self.emit(SwapOut(self._serial, hvp, frame, slot, self.memory.checksum(frame)))

    def _drop(self, hvp: int, why: str) -> None:
        frame = self._frame[hvp]
        self._move(hvp, why)
        self._flags[hvp] = 0
        self._frame[hvp] = -1
        self.give_frame(frame)

    def _swap_out_done(self, event: SwapOutDone) -> None:
        hvp = event.hvp
        if self._writes.get(hvp) != event.serial:
            self._stale_write(event)
            return
        del self._writes[hvp]
        if not event.ok:
            self._write_failed(event)
            return
        self.obs.count(HostCounter.SWAP_OUT_PAGES)
        self.obs.trace(Kind.SWAP_OUT_DONE, a=hvp, b=event.slot, c=event.frame)
        self._slot[hvp] = event.slot
        if self._state[hvp] == HPT_WRITING:
            self._drop(hvp, "written")
        else:
            # Taken back and only read since: clean, with a valid slot. Its nested entry stays read-only until the next store,
            # which faults once and finds nothing to cancel.
            self._flags[hvp] &= ~(F_WRITEBACK | F_DIRTY)

    def _stale_write(self, event: SwapOutDone) -> None:
        """Answer to a cancelled write: only now may its slot and its frame be used again."""
        if event.slot >= 0:
            self.free_slot(event.slot)
        elif not event.full:
            # A write that failed has given its slot back already.
            self._unstick()
        frame = self._pinned.pop(event.serial, -1)
        if frame in self._limbo and frame not in self._pinned.values():
            self._limbo.discard(frame)
            self._push_free(frame)

    def _write_failed(self, event: SwapOutDone) -> None:
        """The page stays in memory, dirty. When there was no slot, reclaim leaves it alone until one comes back."""
        hvp = event.hvp
        self._slot[hvp] = -1
        if self._state[hvp] == HPT_WRITING:
            self._move(hvp, "keep")
        self._flags[hvp] = (self._flags[hvp] | F_DIRTY | F_YOUNG) & ~F_WRITEBACK
        if event.full:
            self.swap_full = True
            self._flags[hvp] |= F_STUCK
        else:
            self._unstick()

    def free_slot(self, slot: int) -> None:
        """Nobody needs what is in a slot, and no request names it."""
        self._unstick()
        self.emit(SlotFree(slot))

    def _unstick(self) -> None:
        """A slot came back: one of the pages that found none may try again."""
        if self.swap_full:
            stuck = np.flatnonzero(self.flags & F_STUCK)
            if len(stuck):
                self.flags[stuck[0]] &= 255 - F_STUCK
            self.swap_full = len(stuck) > 1

    @property
    def stuck(self) -> int:
        """Frames that cannot change their page as long as no slot is free."""
        return int(np.count_nonzero(self.flags & F_STUCK)) if self.swap_full else 0

    def cancel_write_of(self, hvp: int) -> bool:
        """The page of a write under way is given up: frame and slot are free when it is answered. False: there is no such write."""
        if hvp not in self._writes:
            return False
        self._pinned[self._writes.pop(hvp)] = self._frame[hvp]
        return True

    def forget_page(self, hvp: int) -> None:
        """The guest gave it back: as if it had never been touched."""
        self._move(hvp, "give_back")
        self._flags[hvp] = 0
        self._frame[hvp] = -1
        self._slot[hvp] = -1

    @property
    def slots_coming(self) -> int:
        """Slots that will be free when writes under way are answered: their pages were written to or given back meanwhile."""
        return len(self._pinned)

    # -- frames --------------------------------------------------------------------------------------------
    def _take_frame(self, hvp: int) -> int:
        if self.free_count == 0:
            raise MachineError("take_frame: none is free; callers queue for one")
        self.free_count -= 1
        frame = self._free[self.free_count]
        self._owner[frame] = hvp
        self._frame[hvp] = frame
        return frame

    def give_frame(self, frame: int) -> None:
        """A frame that no page has any more and no vCPU reaches; limbo, while an unanswered write names it."""
        self._owner[frame] = -1
        if self._pinned and frame in self._pinned.values():
            self._limbo.add(frame)
            return
        self._push_free(frame)

    def _push_free(self, frame: int) -> None:
        self._free[self.free_count] = frame
        self.free_count += 1

    def _feed_frame_waiters(self) -> None:
        """Frames came back: the host first, else first come, first served."""
        for queue, urgent, left in (
            (self._urgent, True, 0),
            (self._frame_waiters, False, self.limits.reserve),
        ):
            while queue and self.free_count > left:
                hvp = queue.popleft()
                if self._state[hvp] == HPT_READING:
                    if self._frame[hvp] < 0:
                        self._read(hvp, urgent)
                else:
                    self.serve(hvp)
