"""Pages that come from swap. Part of the vm machine.

Invariants
* A page in READING has one read under way however many wait for it, or queues for a landing frame.
* A page is RESIDENT only after its bytes had the right sum; one of which no copy can be read is lost (BAD).

Not handled here: which copy is read, a second attempt, retries (host/reads.py); who waits (host/waiters.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host.events import FrameBack, FrameLent, LendFrame, SlotFree, SwapIn, SwapInBad, SwapInDone
from host.kernels import F_DIRTY, F_YOUNG, HPT_READING
from proto.machine import MachineError
from proto.stats import HostCounter
from proto.trace import Kind

if TYPE_CHECKING:
    from host.vm import VmMachine


class PageIn:
    """Reads of all pages, from the wish to the page."""

    __slots__ = ("_flags", "_frame", "_m", "_slot", "_state")

    def __init__(self, machine: VmMachine) -> None:
        self._m = machine
        self._state = machine.state.data
        self._frame = machine.frame_of.data
        self._slot = machine.slot_of.data
        self._flags = machine.flags.data

    def want(self, hvp: int, *, urgent: bool) -> None:
        """Somebody waits for a page that is in its slot only."""
        self._m.move(hvp, "want")
        self._frame[hvp] = -1
        self.read(hvp, urgent=urgent)

    def read(self, hvp: int, *, urgent: bool) -> None:
        """Start the read of a page in READING, or queue for a landing frame."""
        m = self._m
        if m.frames.short(urgent=urgent):
            m.waiters.queue(hvp, urgent=urgent)
            return
        frame = m.frames.take(hvp)
        m.obs.trace(Kind.SWAP_IN, a=hvp, b=self._slot[hvp], c=frame)
        m.emit(SwapIn(hvp, self._slot[hvp], frame))

    def done(self, event: SwapInDone) -> None:
        """A read has ended. Raises MachineError for one that was not under way."""
        m = self._m
        hvp, frame = event.hvp, event.frame
        if m.giveback.landed(event):
            return
        if self._state[hvp] != HPT_READING or (self._frame[hvp] != frame and frame not in m.frames.lent):
            raise MachineError(
                f"swap-in of page {hvp} into frame {frame}, which is in state {self._state[hvp]}"
            )
        if self._frame[hvp] != frame:
            m.frames.exchange(hvp, frame)
        if not event.ok:
            self._poison(hvp)
            return
        if m.memory.checksum(frame) != event.xxh3:
            # Its reply has come, so nothing else lands in this frame.
            m.obs.count(HostCounter.CHECKSUM_ERRORS)
            m.emit(SwapInBad(hvp, event.slot, frame, event.copy))
            return
        m.obs.trace(Kind.SWAP_IN_DONE, a=hvp, b=event.slot, c=frame)
        m.obs.count(HostCounter.SWAP_IN_PAGES)
        m.move(hvp, "arrive")
        self._flags[hvp] = F_YOUNG
        if event.rewrite:
            m.obs.count(HostCounter.REWRITTEN)
            self._flags[hvp] |= F_DIRTY
            self._slot[hvp] = -1
            m.page_out.free_slot(event.slot)
        m.waiters.serve(hvp)

    def _poison(self, hvp: int) -> None:
        """No copy can be read: the page is lost, and whoever touches it gets a machine check."""
        m = self._m
        m.obs.count(HostCounter.IO_ERRORS)
        frame, slot = self._frame[hvp], self._slot[hvp]
        m.move(hvp, "poison")
        self._frame[hvp] = self._slot[hvp] = -1
        m.emit(SlotFree(slot))
        m.frames.give(frame)
        m.waiters.serve(hvp)

    # -- further reads of a page ---------------------------------------------------------------------------
    def lend(self, event: LendFrame) -> None:
        """A landing frame for a second read; none for a page that nobody reads any more, and none that reclaim would have to replace."""
        m = self._m
        spare = m.frames.free_count > max(m.limits.reserve, m.limits.low) and not m.waiters.starving
        wanted = self._state[event.hvp] == HPT_READING
        m.emit(FrameLent(event.hvp, m.frames.lend_free() if spare and wanted else -1))

    def frame_back(self, event: FrameBack) -> None:
        """Nothing can land in a lent frame any more."""
        self._m.frames.end_loan(event.frame)
        # The block that its request named may be free now as well.
        self._m.page_out.unstick()
