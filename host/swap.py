"""The swap machine: what is asked of which daemon for which copy of a slot, and what an answer may still mean.

The host owns the swap map, as a kernel does; a daemon owns only bytes. Where the copies of a slot lie is in host/copies.py,
which of them is read, in host/reads.py.

Invariants
* A request is known by its id; it is answered once, whoever answers how often. A reply of another epoch, or of an id that is not
  in flight, is counted and dropped. What is not answered for `RESEND_NS` is sent again under the same id, which a daemon does only once;
  an attempt that failed, or that goes to another daemon, is asked for under a new id.
* Killing a daemon is not a fence: from `DaemonLost` to `DaemonFenced` its unanswered requests keep their frames and blocks, and
  nothing is sent in their place. Only a new epoch after the fence gets them again, with the same id, block and frame: then nobody
  else can write there.
* A copy's checksum is the one of the last acknowledged write. A block is reused only after every request that names it was answered
  or fenced.
* At most WINDOW requests per daemon are out; the rest waits here in order, so a daemon that stops reading costs no memory elsewhere.

Deliberately not here: restarting daemons (launcher), checking the bytes (host/page_in.py compares the sum).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from host.copies import SLOTS_PER_DAEMON, Copies
from host.events import (
    CancelRead,
    DaemonFenced,
    DaemonGone,
    DaemonLost,
    DaemonUp,
    FrameLent,
    IoReply,
    LookAtRequests,
    SendIo,
    SlotFree,
    SlotsLost,
    SwapIn,
    SwapInBad,
    SwapOut,
    SwapOutDone,
    WritesStand,
)
from host.observe import Observer
from host.reads import Reads
from host.requests import Daemon, Read, Request, Write
from proto.lives import DAEMON, DaemonState
from proto.machine import Machine, MachineError, Path
from proto.stats import HostCounter
from proto.trace import Kind
from proto.units import PAGE_SIZE
from proto.wire import OP_READ, OP_WRITE

WINDOW: Final = 256
"""Requests out per daemon: four times the deepest I/O queue, so that the daemon never runs dry between two messages."""
RESEND_NS: Final = 1_000_000_000
"""A request or its reply is taken for lost after this long: far above what a device needs, and a needless copy does no harm."""
ATTEMPTS_MAX: Final = 3
"""Sends of one request that the device may answer with an error before it counts as failed."""

_UP: Final = DaemonState.UP
"""Looked at after every event: a plain name is ten times cheaper than the enum's attribute."""


def op_of(request: int) -> int:
    """OP_READ or OP_WRITE of a request's id."""
    return request & 1


class SwapMachine(Machine):
    """All daemons of a run. ``slots``: blocks of each daemon's file; ``replicas``: copies of each page; ``hedge_ns``: a read that was not
    answered for so long is asked of the other copy, too, 0 = never.
    """

    def __init__(
        self, slots: Sequence[int], observer: Observer, replicas: int = 1, hedge_ns: int = 0
    ) -> None:
        super().__init__()
        self.obs = observer
        self.copies = Copies(slots, replicas)
        self.daemons = [Daemon() for _ in slots]
        self.reads = Reads(self, hedge_ns if replicas > 1 else 0)
        self._singles = 0
        self._next_id = 2
        self._writes_stand = False
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            SwapIn: self.reads.swap_in,
            SwapInBad: self.reads.swap_in_bad,
            FrameLent: self.reads.frame_lent,
            SwapOut: self._swap_out,
            SlotFree: lambda event: self.copies.free(event.slot),
            CancelRead: self.reads.cancel,
            IoReply: self._reply,
            LookAtRequests: self._look_at_requests,
            DaemonUp: self._daemon_up,
            DaemonLost: self._daemon_lost,
            DaemonFenced: self._daemon_fenced,
            DaemonGone: self._daemon_gone,
        }

    def path_for(self, event: Any) -> Path | None:
        """Every event is handled at once."""
        handler = self._handlers.get(type(event))
        if handler is None:
            raise MachineError(f"swap machine: unknown event {event!r}")
        handler(event)
        return None

    def settle(self) -> None:
        """Fill the windows."""
        for index, daemon in enumerate(self.daemons):
            while daemon.state is _UP and daemon.queue and len(daemon.out) < WINDOW:
                self._send(index, daemon, daemon.queue.popleft())
        self.reads.forget_done()
        if self._singles != self.copies.singles:
            self._singles = self.copies.singles
            self.obs.gauge(HostCounter.SINGLE_COPIES, self._singles)

    @property
    def slots_used(self) -> int:
        """Blocks that hold a copy or are named by a request."""
        return self.copies.used

    @property
    def outstanding(self) -> int:
        """Requests waiting or out."""
        return sum(daemon.backlog for daemon in self.daemons)

    @property
    def next_hedge_ns(self) -> int:
        """When `LookAtRequests` will find a read that is late; 0: nothing to wait for."""
        return self.reads.next_hedge_ns

    def landing_frame(self, daemon: int, request: int) -> int | None:
        """Where the page of a read in flight belongs; None for a write or an id that is not in flight."""
        found = self.daemons[daemon].out.get(request)
        return found.frame if found is not None and found.op == OP_READ else None

    # -- writes --------------------------------------------------------------------------------------------
    def _swap_out(self, event: SwapOut) -> None:
        copies = self.copies
        slot = copies.rewrite(event.slot, self.answers) if event.slot >= 0 else copies.take(self.answers)
        if slot < 0:
            self.emit(SwapOutDone(event.serial, event.hvp, -1, event.frame, ok=False, full=True))
            return
        write = Write(event, slot)
        for copy in copies.copies(slot):
            write.left += 1
            self.enqueue(Request(self.new_id(OP_WRITE), OP_WRITE, copy, event.frame, write))

    def _copy_written(self, request: Request, write: Write, *, ok: bool) -> None:
        """One copy is answered; when all are, the page is written if one of them holds it."""
        self.copies.unname(request.copy)
        write.left -= 1
        if ok:
            write.good.append(request.copy)
        if write.left:
            return
        event = write.event
        # One that was answered may be on a daemon that is gone since.
        good = [copy for copy in self.copies.copies(write.slot) if copy in write.good]
        if good:
            slot = self.copies.written(write.slot, good, event.xxh3)
            self.emit(SwapOutDone(event.serial, event.hvp, slot, event.frame, ok=True, full=False))
            return
        self.copies.free(write.slot)
        self.emit(SwapOutDone(event.serial, event.hvp, -1, event.frame, ok=False, full=False))

    # -- requests ------------------------------------------------------------------------------------------
    def is_up(self, index: int) -> bool:
        """Whether requests are sent to this daemon."""
        return self.daemons[index].state is _UP

    def answers(self, index: int) -> bool:
        """Up, and what was asked of it first is not long overdue: a daemon may be silent for long before it is given up."""
        daemon = self.daemons[index]
        if daemon.state is not _UP:
            return False
        oldest = next(iter(daemon.out.values()), None)
        return oldest is None or self.now_ns - oldest.since_ns < RESEND_NS

    def new_id(self, op: int) -> int:
        """Rising; the lowest bit says what is asked for, so that also a reply to a forgotten request can be read (`op_of`)."""
        ident = self._next_id
        self._next_id += 2
        return ident | op

    def enqueue(self, request: Request) -> None:
        """Behind all that waits for the same daemon; the request names its block from here on."""
        self.copies.name(request.copy)
        self.daemons[request.copy // SLOTS_PER_DAEMON].queue.append(request)

    def settled(self, daemon: int) -> int:
        """Ids of this daemon below it are answered and will not be asked for again."""
        one = self.daemons[daemon]
        return min([*one.out, *(request.id for request in one.queue)], default=self._next_id)

    def _send(self, index: int, daemon: Daemon, request: Request) -> None:
        request.attempts += 1
        request.sent_epoch = daemon.epoch
        request.since_ns = self.now_ns
        daemon.out[request.id] = request
        self._emit_io(index, daemon, request)

    def _emit_io(self, index: int, daemon: Daemon, request: Request) -> None:
        request.sent_ns = self.now_ns
        self.emit(
            SendIo(
                index, daemon.epoch, request.id, request.op, request.copy % SLOTS_PER_DAEMON, request.frame
            )
        )

    def _look_at_requests(self, _: LookAtRequests) -> None:
        for index, daemon in enumerate(self.daemons):
            if daemon.state is not _UP:
                continue
            for request in daemon.out.values():
                if self.now_ns - request.sent_ns >= RESEND_NS:
                    self.obs.count(HostCounter.RESENT)
                    self._emit_io(index, daemon, request)
        self.reads.hedge()

    # -- replies -------------------------------------------------------------------------------------------
    def _reply(self, event: IoReply) -> None:
        daemon = self.daemons[event.daemon]
        request = daemon.out.get(event.request)
        if request is None or event.epoch != daemon.epoch or request.sent_epoch != event.epoch:
            self.obs.count(HostCounter.STALE_REPLIES)
            return
        del daemon.out[event.request]
        job = request.job
        if isinstance(job, Read) and job.done:
            self.reads.drop(request)
            return
        ok = event.result == PAGE_SIZE
        if not ok and request.attempts < ATTEMPTS_MAX:
            self.obs.count(HostCounter.IO_RETRIES)
            # The daemon has answered the old id and would answer the same again.
            request.id = self.new_id(request.op)
            daemon.queue.append(request)
            return
        if not ok:
            self.obs.count(HostCounter.IO_ERRORS)
        if isinstance(job, Write):
            self.obs.count(HostCounter.DAEMON_WRITES)
            self._copy_written(request, job, ok=ok)
        elif ok:
            self.copies.unname(request.copy)
            self.reads.arrived(request, job)
        else:
            self.obs.count(HostCounter.DAEMON_READS)
            self.reads.failed(request, job)

    # -- daemons -------------------------------------------------------------------------------------------
    def _daemon_up(self, event: DaemonUp) -> None:
        daemon = self.daemons[event.daemon]
        if event.epoch < daemon.epoch or daemon.state is not DaemonState.FENCED:
            raise MachineError(
                f"daemon {event.daemon} epoch {event.epoch} came up before epoch {daemon.epoch} was fenced"
            )
        daemon.epoch = event.epoch
        daemon.state = DAEMON.go(daemon.state, "hello")
        self.obs.trace(Kind.DAEMON_UP, a=event.daemon, b=event.epoch)
        self._tell_of_writes()
        for index, other in enumerate(self.daemons):
            if other.state is not _UP:
                self.reads.turn_to_others(index)

    def _daemon_lost(self, event: DaemonLost) -> None:
        daemon = self.daemons[event.daemon]
        was_up = event.epoch == daemon.epoch and daemon.state is DaemonState.UP
        daemon.state = DAEMON.go(daemon.state, "lose")
        if not was_up:
            return  # it died before it said HELLO: nothing was sent to it
        self.obs.trace(Kind.DAEMON_DOWN, a=event.daemon, b=event.epoch)
        self._tell_of_writes()
        self.reads.turn_to_others(event.daemon)

    def _tell_of_writes(self) -> None:
        """The vm machine wants to know whether frames of pages that are written will be free soon."""
        stand = not any(daemon.state is _UP for daemon in self.daemons)
        if stand != self._writes_stand:
            self._writes_stand = stand
            self.emit(WritesStand(stand))

    def _daemon_fenced(self, event: DaemonFenced) -> None:
        """From here no byte of the old epoch can land: what is still wanted of it is sent again, oldest first, into the same frames."""
        daemon = self.daemons[event.daemon]
        daemon.state = DAEMON.go(daemon.state, "fence")
        self.obs.count(HostCounter.FENCES)
        self.obs.trace(Kind.FENCED, a=event.daemon, b=event.epoch)
        again: list[Request] = []
        for request in daemon.out.values():
            job = request.job
            if isinstance(job, Read) and job.done:
                self.reads.drop(request)
            elif isinstance(job, Read) and len(job.live) > 1:
                job.live.remove(request)
                self.copies.unname(request.copy)
                job.spare.append(request.frame)
            else:
                request.attempts -= 1
                again.append(request)
        daemon.out.clear()
        daemon.queue.extendleft(reversed(again))
        self.reads.turn_to_others(event.daemon)
        waiting = {request.id for request in daemon.queue}
        self.obs.count(HostCounter.RESENT, sum(request.id in waiting for request in again))

    def _daemon_gone(self, event: DaemonGone) -> None:
        """Nobody starts it again: its slots go on from their other copies, and what it was asked for is asked elsewhere or has failed."""
        daemon = self.daemons[event.daemon]
        daemon.state = DAEMON.go(daemon.state, "give_up")
        lost = self.copies.gone(event.daemon)
        self.obs.count(HostCounter.DAEMONS_GONE)
        self.obs.trace(Kind.DAEMON_GONE, a=event.daemon, b=daemon.epoch, c=len(lost))
        alone = all(one.state is DaemonState.GONE for one in self.daemons)
        self.emit(SlotsLost(event.daemon, tuple(lost), alone or self.copies.replicas == 1))
        queue, daemon.queue = daemon.queue, deque()
        for request in queue:
            if isinstance(request.job, Write):
                self._copy_written(request, request.job, ok=False)
            else:
                self.reads.no_longer_there(request, request.job)
