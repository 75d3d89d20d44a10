"""Pages that a guest gives back: free page reporting, as a balloon does it. Part of the vm machine.

A page that is given back holds nothing from then on: it counts as never touched, so the next touch finds zeros. Its nested entries are
cleared; what it was in is free as soon as nobody can reach it any more:

    its frame   when every vCPU of the VM has acknowledged the flush or is outside guest mode
    its slot    at once
    both, of a write under way, and the frame of a read: when that is answered (host/swap.py: a request keeps what it names)

Who waits for such a page is served: with zeros, or, the worker of an asynchronous fault, with "done", which does not mean present.

Not handled here: which pages (guest/oom.py), when a guest has to give some (host/shortage.py).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from host.events import Answer, CancelRead, FrameBack, ReadCancelled, ReleasePages, SlotFree, SwapInDone
from host.kernels import HPT_NONE, HPT_READING
from proto.stats import HostCounter
from proto.trace import Kind

if TYPE_CHECKING:
    from host.vm import VmMachine

MASK_BITS: Final = 64


class GiveBack:
    """The pages of all VMs that are on their way out without being written."""

    def __init__(self, machine: VmMachine) -> None:
        self._m = machine
        self._parting: list[deque[tuple[int, int]]] = [deque() for _ in range(machine.memory.vm_count)]
        """(flush generation, frame) by VM: a vCPU may still reach the frame."""
        self._held: list[deque[tuple[int, ReleasePages]]] = [deque() for _ in range(machine.memory.vm_count)]
        """(flush generation, request) of who waits until nobody reaches what was released before."""
        self._landing: dict[tuple[int, int], int] = {}
        """(page, slot) -> frame of reads under way whose page was given back, until the swap machine has heard of it."""

    @property
    def pending(self) -> bool:
        """Whether flush acknowledgements are awaited."""
        return any(self._parting) or any(self._held)

    def release(self, event: ReleasePages) -> None:
        """Take the pages of one request."""
        m = self._m
        if not event.mask:
            # The generation that the last release began; a flush of its own where there was none.
            self._held[event.vm].append((self._flush(event.vm, 0), event))
            return
        frames: list[int] = []
        held = 0
        waited: list[int] = []
        for bit in range(MASK_BITS):
            if event.mask >> bit & 1 and (hvp := self._find(event.vm, event.gfn + bit)) >= 0:
                held += self._take(event.vm, hvp, frames)
                waited.append(hvp)
        if frames:
            generation = self._flush(event.vm, len(frames))
            self._parting[event.vm].extend((generation, frame) for frame in frames)
        m.obs.count(HostCounter.PAGES_RELEASED, held)
        for hvp in waited:
            m.waiters.serve(hvp)
        m.emit(Answer(event.cpu, event.ask, held, waited=False))

    def _find(self, vm: int, gfn: int) -> int:
        """The host page of a guest frame, also while its memslot is about to move; -1: there is none."""
        hvp = self._m.find_hvp(vm, gfn)
        return hvp if hvp >= 0 else self._m.change.former_hvp(vm, gfn)

    def _flush(self, vm: int, pages: int) -> int:
        m = self._m
        generation = m.memory.bump_generation(vm)
        m.obs.count(HostCounter.FLUSHES)
        m.obs.trace(Kind.FLUSH, vm=vm, a=generation, b=pages)
        return generation

    def _take(self, vm: int, hvp: int, frames: list[int]) -> bool:
        """Make a page one that was never touched; its frame, if only a flush is due, into ``frames``. True: it held something."""
        m = self._m
        for gfn in m.slots.gfns_of(vm, hvp):
            m.memory.unmap(vm, gfn)
        state, frame, slot = int(m.state[hvp]), int(m.frame_of[hvp]), int(m.slot_of[hvp])
        if state == HPT_NONE:
            return False
        if state == HPT_READING and frame >= 0:
            self._landing[hvp, slot] = frame
            m.frames.lend(frame)
            m.emit(CancelRead(hvp, slot))
            # A block that the read names comes back with its frame, and helps then.
            m.emit(SlotFree(slot))
        else:
            if not m.page_out.given_up(hvp) and slot >= 0:
                m.page_out.free_slot(slot)
            if frame >= 0:
                frames.append(frame)
        m.forget_page(hvp)
        if slot < 0 and m.page_out.swap_full:
            # A slot that came back may have been meant for this page.
            m.page_out.unstick()
        return True

    def landed(self, event: SwapInDone) -> bool:
        """The end of a read whose page was given back before the swap machine heard of it. False: it is no such read.

        The frame that it ended in is free now. If that is one of a second attempt, the page's own comes back later.
        """
        if (event.hvp, event.slot) not in self._landing:
            return False
        self._m.page_in.frame_back(FrameBack(event.frame))
        return True

    def cancelled(self, event: ReadCancelled) -> None:
        """The swap machine has heard of it."""
        del self._landing[event.hvp, event.slot]

    def advance(self) -> None:
        """Free the frames, and answer those who waited, as far as the vCPUs have flushed."""
        m = self._m
        for vm, (parting, held) in enumerate(zip(self._parting, self._held, strict=True)):
            if not parting and not held:
                continue
            newest = max(parting[-1][0] if parting else 0, held[-1][0] if held else 0)
            oldest = m.memory.oldest_generation(vm, newest)
            while parting and parting[0][0] <= oldest:
                m.frames.give(parting.popleft()[1])
            while held and held[0][0] <= oldest:
                _, event = held.popleft()
                m.emit(Answer(event.cpu, event.ask, 0, waited=False))
