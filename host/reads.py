"""Reads of the swap machine: which copy of a page is asked, when another one is, and which frame belongs to whom.

Invariants
* Each attempt of a read has its own landing frame: the page's own, or one that the vm machine lends. The first whose bytes come is
  offered to the vm machine, which compares the sum; frames of the others go back when nothing can land in them any more.
* Before the fence of a daemon its reads go to another copy only with another frame, after it with the same.
* A copy is given up after STRIKES_MAX bad reads; while another one can be read, nobody is told.

Not handled here: windows, replies, epochs (host/swap.py), where copies lie (host/copies.py).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from host.copies import SLOTS_PER_DAEMON
from host.events import (
    CancelRead,
    FrameBack,
    FrameLent,
    LendFrame,
    ReadCancelled,
    SwapIn,
    SwapInBad,
    SwapInDone,
)
from host.requests import Read, Request
from proto.machine import MachineError
from proto.stats import HostCounter, HostHist
from proto.trace import Kind
from proto.wire import OP_READ

if TYPE_CHECKING:
    from host.swap import SwapMachine

STRIKES_MAX: Final = 3
"""Reads of one copy that may fail, or bring a wrong sum, before it is given up."""


class Reads:
    """All reads under way. ``hedge_ns``: after how long another copy is asked, too, 0 = never."""

    __slots__ = ("_copies", "_daemons", "_hedge_ns", "_hedges", "_obs", "_reads", "_strikes", "_swap")

    def __init__(self, swap: SwapMachine, hedge_ns: int) -> None:
        self._swap = swap
        self._obs = swap.obs
        self._copies = swap.copies
        self._daemons = swap.daemons
        self._hedge_ns = hedge_ns
        self._hedges: deque[tuple[int, Read]] = deque()
        self._reads: dict[int, Read] = {}
        self._strikes: dict[int, dict[int, int]] = {}
        """Bad reads of each copy, by page: from the first one to the page's next read."""

    @property
    def next_hedge_ns(self) -> int:
        """When `hedge` will find a read that is late; 0: nothing to wait for."""
        return self._hedges[0][0] if self._hedges else 0

    def forget_done(self) -> None:
        """Nothing to wait for where the page has come."""
        while self._hedges and self._hedges[0][1].done:
            self._hedges.popleft()

    def hedge(self) -> None:
        """Time has passed: ask another copy for what is late."""
        while self._hedges and self._hedges[0][0] <= self._swap.now_ns:
            read = self._hedges.popleft()[1]
            if len(read.live) == 1:
                self.ask_another(read, hedge=True)

    def swap_in(self, event: SwapIn) -> None:
        """The vm machine wants a page."""
        self._strikes.pop(event.hvp, None)
        read = self._begin(event.hvp, event.slot)
        self._ask_best(read, event.frame)
        if self._hedge_ns and self._copies.good(event.slot) > 1:
            self._hedges.append((self._swap.now_ns + self._hedge_ns, read))

    def swap_in_bad(self, event: SwapInBad) -> None:
        """What came had another sum."""
        self._strike(self._begin(event.hvp, event.slot), event.copy, event.frame)

    def _begin(self, hvp: int, slot: int) -> Read:
        if hvp in self._reads:
            raise MachineError(f"page {hvp} is read twice at a time")
        read = self._reads[hvp] = Read(hvp, slot, self._swap.now_ns)
        return read

    def _ask_best(self, read: Read, frame: int) -> None:
        """Read the copy on a daemon that answers with the least to do, the first one if that is equal. With none up it waits for one."""
        copies = self._copies.copies(read.slot)
        if not copies:
            self._done(read, frame, ok=False, xxh3=0, copy=-1, rewrite=False)
            return
        best = copies
        if len(copies) > 1:
            best = [copy for copy in copies if self._swap.answers(copy // SLOTS_PER_DAEMON)] or [
                copy for copy in copies if self._swap.is_up(copy // SLOTS_PER_DAEMON)
            ]
        if best and best[0] != read.slot:
            self._obs.count(HostCounter.REPLICA_READS)
        best = best or copies[:1]
        if len(best) > 1:
            best.sort(key=lambda copy: self._daemons[copy // SLOTS_PER_DAEMON].backlog)
        self._ask(read, best[0], frame)

    def _ask(self, read: Read, copy: int, frame: int, hedge: bool = False) -> None:
        request = Request(self._swap.new_id(OP_READ), OP_READ, copy, frame, read)
        request.hedge = hedge
        read.live.append(request)
        self._swap.enqueue(request)

    def arrived(self, request: Request, read: Read) -> None:
        """The first bytes that came for this page; the other attempts have lost."""
        self._obs.record(HostHist.SWAP_IN, self._swap.now_ns - read.started_ns)
        self._obs.count(HostCounter.DAEMON_READS)
        if request.hedge:
            self._obs.count(HostCounter.HEDGE_WINS)
        slot, copy = read.slot, request.copy
        self._done(
            read,
            request.frame,
            ok=True,
            xxh3=self._copies.xxh3(copy),
            copy=copy,
            rewrite=self._lacks(slot, read.hvp),
        )
        self._drop_waiting(read, but=request)

    def _done(self, read: Read, frame: int, *, ok: bool, xxh3: int, copy: int, rewrite: bool) -> None:
        """Say how a read ended. The vm machine hears first whose frame the page is in, then which frames are free."""
        read.done = True
        del self._reads[read.hvp]
        self._swap.emit(SwapInDone(read.hvp, read.slot, frame, ok, xxh3, copy, rewrite))
        self._spare_frames_back(read)

    def cancel(self, event: CancelRead) -> None:
        """Nobody waits for that page: all attempts have lost. A read that ended meanwhile has said so already."""
        read = self._reads.get(event.hvp)
        if read is not None and read.slot == event.slot:
            read.done = True
            del self._reads[read.hvp]
            self._drop_waiting(read)
            self._spare_frames_back(read)
        self._strikes.pop(event.hvp, None)
        self._swap.emit(ReadCancelled(event.hvp, event.slot))

    def _spare_frames_back(self, read: Read) -> None:
        for spare in read.spare:
            self._swap.emit(FrameBack(spare))
        read.spare.clear()

    def _drop_waiting(self, read: Read, but: Request | None = None) -> None:
        """Attempts that were not sent yet are not needed any more."""
        for request in read.live:
            daemon = self._daemons[request.copy // SLOTS_PER_DAEMON]
            if request is not but and request in daemon.queue:
                daemon.queue.remove(request)
                self.drop(request)

    def _lacks(self, slot: int, hvp: int) -> bool:
        """Whether the slot has fewer copies than it could have: one proved bad, or could not be written then."""
        if any(strikes >= STRIKES_MAX for strikes in self._strikes.get(hvp, {}).values()):
            return True
        if self._copies.replicas == 1 or self._copies.good(slot) != 1:
            return False
        holder = self._copies.copies(slot)[0] // SLOTS_PER_DAEMON
        return any(self._swap.is_up(d) for d in range(len(self._daemons)) if d != holder)

    def drop(self, request: Request) -> None:
        """Nothing can land in this attempt's frame any more, and nobody waits for it."""
        self._copies.unname(request.copy)
        self._swap.emit(FrameBack(request.frame))

    def failed(self, request: Request, read: Read) -> None:
        """The device gave this attempt up. Another one that is under way may still bring the page."""
        read.live.remove(request)
        self._copies.unname(request.copy)
        if read.live:
            read.spare.append(request.frame)
            self._count_strike(read, request.copy)
        else:
            self._strike(read, request.copy, request.frame)

    def _strike(self, read: Read, copy: int, frame: int) -> None:
        """A copy was read in vain, and nobody else is asked: again, or another copy, or nobody."""
        given_up = self._count_strike(read, copy)
        if (
            given_up
            or not self._swap.is_up(copy // SLOTS_PER_DAEMON)
            or copy not in self._copies.copies(read.slot)
        ):
            self._ask_best(read, frame)
        else:
            self._obs.count(HostCounter.IO_RETRIES)
            self._ask(read, copy, frame)

    def _count_strike(self, read: Read, copy: int) -> bool:
        """True when the copy is given up, and its block with it."""
        strikes = self._strikes.setdefault(read.hvp, {})
        strikes[copy] = strikes.get(copy, 0) + 1
        if strikes[copy] < STRIKES_MAX:
            return False
        if self._copies.quarantine(read.slot, copy):
            self._obs.count(HostCounter.QUARANTINED)
            self._obs.trace(Kind.COPY_BAD, a=read.hvp, b=copy)
        return True

    # -- second attempts -----------------------------------------------------------------------------------
    def _other_copy(self, read: Read) -> int:
        """A copy on a daemon that is up and is not asked for this page; -1: none."""
        asked = [request.copy for request in read.live]
        for copy in self._copies.copies(read.slot):
            if copy not in asked and self._swap.is_up(copy // SLOTS_PER_DAEMON):
                return copy
        return -1

    def ask_another(self, read: Read, *, hedge: bool) -> None:
        """Ask another copy while an attempt may still land: with a frame of its own."""
        if read.done or read.wants_frame or self._other_copy(read) < 0:
            return
        read.hedge = hedge
        if read.spare:
            self._second(read, read.spare.pop())
        else:
            read.wants_frame = True
            self._swap.emit(LendFrame(read.hvp))

    def frame_lent(self, event: FrameLent) -> None:
        """The vm machine's answer to `LendFrame`."""
        read = self._reads.get(event.hvp)
        wanted = read is not None and read.wants_frame
        if read is not None:
            read.wants_frame = False
        if event.frame < 0:
            self._obs.count(HostCounter.FRAMES_REFUSED)
        elif read is None or not wanted or self._other_copy(read) < 0:
            self._swap.emit(FrameBack(event.frame))
        else:
            self._second(read, event.frame)

    def _second(self, read: Read, frame: int) -> None:
        self._obs.count(HostCounter.HEDGED if read.hedge else HostCounter.REPLICA_READS)
        self._ask(read, self._other_copy(read), frame, read.hedge)

    def turn_to_others(self, index: int) -> None:
        """A daemon is not up: pages that have another copy come from there, at once."""
        daemon = self._daemons[index]
        for request in list(daemon.queue):
            read = request.job
            if isinstance(read, Read) and (copy := self._other_copy(read)) >= 0:
                # It was never sent, or fenced: its frame can go along.
                daemon.queue.remove(request)
                read.live.remove(request)
                self._copies.unname(request.copy)
                self._obs.count(HostCounter.REPLICA_READS)
                self._ask(read, copy, request.frame)
        for request in list(daemon.out.values()):
            if isinstance(request.job, Read) and len(request.job.live) == 1:
                self.ask_another(request.job, hedge=False)

    def no_longer_there(self, request: Request, read: Read) -> None:
        """The daemon that this fenced request waits for is gone."""
        read.live.remove(request)
        self._copies.unname(request.copy)
        if read.live:
            read.spare.append(request.frame)
        else:
            self._ask_best(read, request.frame)
