"""The swap machine: what is asked of which daemon for which copy of a slot, and what an answer may still mean.

The host owns the swap map, as a kernel does; a daemon owns only bytes. Where the copies of a slot lie is in host/copies.py.

Invariants
* A request is known by its id; it is answered once, whoever answers how often. A reply of another epoch, or of an id that is not
  in flight, is counted and dropped. What is not answered for `RESEND_NS` is sent again under the same id, which a daemon does only once;
  an attempt that failed, or that goes to another daemon, is asked for under a new id.
* Killing a daemon is not a fence: from `DaemonLost` to `DaemonFenced` its unanswered requests keep their frames and blocks, and
  nothing is sent in their place. Only a new epoch after the fence gets them again, with the same id, block and frame: then nobody
  else can write there. After the fence a read may go to another copy with its frame, before it only with another frame.
* Each attempt of a read has its own landing frame: the page's own, or one that the vm machine lends. The first whose bytes come is
  offered to the vm machine, which compares the sum; frames of the others go back when nothing can land in them any more.
* A copy's checksum is the one of the last acknowledged write. A block is reused only after every request that names it was answered
  or fenced.
* At most WINDOW requests per daemon are out; the rest waits here in order, so a daemon that stops reading costs no memory elsewhere.
* A copy is given up after STRIKES_MAX bad reads; while another one can be read, nobody is told.

Deliberately not here: restarting daemons (launcher), checking the bytes (host/vm.py compares the sum).
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
    FrameBack,
    FrameLent,
    IoReply,
    LendFrame,
    LookAtRequests,
    ReadCancelled,
    SendIo,
    SlotFree,
    SlotsLost,
    SwapIn,
    SwapInBad,
    SwapInDone,
    SwapOut,
    SwapOutDone,
)
from host.observe import Observer
from proto.lives import DAEMON, DaemonState
from proto.machine import Machine, MachineError, Path
from proto.stats import HostCounter, HostHist
from proto.trace import Kind
from proto.units import PAGE_SIZE
from proto.wire import OP_READ, OP_WRITE

WINDOW: Final = 256
"""Requests out per daemon: four times the deepest I/O queue, so that the daemon never runs dry between two messages."""
RESEND_NS: Final = 1_000_000_000
"""A request or its reply is taken for lost after this long: far above what a device needs, and a needless copy does no harm."""
ATTEMPTS_MAX: Final = 3
"""Sends of one request that the device may answer with an error before it counts as failed."""
STRIKES_MAX: Final = 3
"""Reads of one copy that may fail, or bring a wrong sum, before it is given up."""


_UP: Final = DaemonState.UP
"""Looked at after every event: a plain name is ten times cheaper than the enum's attribute."""


def op_of(request: int) -> int:
    """OP_READ or OP_WRITE of a request's id."""
    return request & 1


class _Read:
    """One page on its way in, whoever is asked for it. ``live``: its attempts; ``spare``: its frames in which nothing can land."""

    __slots__ = ("done", "hedge", "hvp", "live", "slot", "spare", "started_ns", "wants_frame")

    def __init__(self, hvp: int, slot: int, now_ns: int) -> None:
        self.hvp = hvp
        self.slot = slot
        self.started_ns = now_ns
        self.live: list[_Request] = []
        self.spare: list[int] = []
        self.done = False
        self.wants_frame = False
        self.hedge = False
        """Whether the frame it wants is for a hedge."""


class _Write:
    """One page on its way out to all copies of its slot. ``good``: copies that have it; ``left``: those that have not answered."""

    __slots__ = ("event", "good", "left", "slot")

    def __init__(self, event: SwapOut, slot: int) -> None:
        self.event = event
        self.slot = slot
        self.good: list[int] = []
        self.left = 0


class _Request:
    """One attempt: a read or write of one copy, from its start to its answer."""

    __slots__ = ("attempts", "copy", "frame", "hedge", "id", "job", "op", "sent_epoch", "sent_ns", "since_ns")

    def __init__(self, ident: int, op: int, copy: int, frame: int, job: _Read | _Write) -> None:
        self.id = ident
        self.op = op
        self.copy = copy
        self.frame = frame
        self.job = job
        self.attempts = 0
        self.sent_epoch = -1
        self.sent_ns = 0
        """When it was sent last."""
        self.since_ns = 0
        """When it was sent first, to this epoch."""
        self.hedge = False


class _Daemon:
    """What the host knows of one daemon: requests waiting and out."""

    __slots__ = ("epoch", "out", "queue", "state")

    def __init__(self) -> None:
        self.queue: deque[_Request] = deque()
        self.out: dict[int, _Request] = {}
        self.epoch = 0
        self.state = DaemonState.FENCED

    @property
    def backlog(self) -> int:
        """Requests that it has not answered."""
        return len(self.queue) + len(self.out)


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
        self.daemons = [_Daemon() for _ in slots]
        self._hedge_ns = hedge_ns if replicas > 1 else 0
        self._hedges: deque[tuple[int, _Read]] = deque()
        self._reads: dict[int, _Read] = {}
        self._strikes: dict[int, dict[int, int]] = {}
        """Bad reads of each copy, by page: from the first one to the page's next read."""
        self._singles = 0
        self._next_id = 2
        self._outage_since_ns = [0] * len(self.daemons)
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            SwapIn: self._swap_in,
            SwapInBad: self._swap_in_bad,
            FrameLent: self._frame_lent,
            SwapOut: self._swap_out,
            SlotFree: lambda event: self.copies.free(event.slot),
            CancelRead: self._cancel_read,
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
        while self._hedges and self._hedges[0][1].done:
            self._hedges.popleft()
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
        return self._hedges[0][0] if self._hedges else 0

    def landing_frame(self, daemon: int, request: int) -> int | None:
        """Where the page of a read in flight belongs; None for a write or an id that is not in flight."""
        found = self.daemons[daemon].out.get(request)
        return found.frame if found is not None and found.op == OP_READ else None

    # -- reads ---------------------------------------------------------------------------------------------
    def _swap_in(self, event: SwapIn) -> None:
        self._strikes.pop(event.hvp, None)
        read = self._begin(event.hvp, event.slot)
        self._ask_best(read, event.frame)
        if self._hedge_ns and self.copies.good(event.slot) > 1:
            self._hedges.append((self.now_ns + self._hedge_ns, read))

    def _swap_in_bad(self, event: SwapInBad) -> None:
        self._strike(self._begin(event.hvp, event.slot), event.copy, event.frame)

    def _cancel_read(self, event: CancelRead) -> None:
        """Nobody waits for that page: its attempts have all lost. One that ended meanwhile has told so already."""
        read = self._reads.get(event.hvp)
        if read is not None and read.slot == event.slot:
            read.done = True
            del self._reads[event.hvp]
            self._give_up_waiting(read)
            for spare in read.spare:
                self.emit(FrameBack(spare))
            read.spare.clear()
        self._strikes.pop(event.hvp, None)
        self.emit(ReadCancelled(event.hvp, event.slot))

    def _give_up_waiting(self, read: _Read, but: _Request | None = None) -> None:
        """Attempts that were not sent yet are not needed any more."""
        for request in read.live:
            daemon = self.daemons[request.copy // SLOTS_PER_DAEMON]
            if request is not but and request in daemon.queue:
                daemon.queue.remove(request)
                self._drop(request)

    def _begin(self, hvp: int, slot: int) -> _Read:
        if hvp in self._reads:
            raise MachineError(f"page {hvp} is read twice at a time")
        read = self._reads[hvp] = _Read(hvp, slot, self.now_ns)
        return read

    def _ask_best(self, read: _Read, frame: int) -> None:
        """Read the copy on a daemon that answers with the least to do, the first one if that is equal. With none up it waits for one."""
        copies = self.copies.copies(read.slot)
        if not copies:
            self._done(read, frame, ok=False, xxh3=0, copy=-1, rewrite=False)
            return
        best = copies
        if len(copies) > 1:
            best = [copy for copy in copies if self._answers(copy // SLOTS_PER_DAEMON)] or [
                copy for copy in copies if self._is_up(copy // SLOTS_PER_DAEMON)
            ]
        if best and best[0] != read.slot:
            self.obs.count(HostCounter.REPLICA_READS)
        best = best or copies[:1]
        if len(best) > 1:
            best.sort(key=lambda copy: self.daemons[copy // SLOTS_PER_DAEMON].backlog)
        self._ask(read, best[0], frame)

    def _ask(self, read: _Read, copy: int, frame: int, hedge: bool = False) -> None:
        request = _Request(self._new_id(OP_READ), OP_READ, copy, frame, read)
        request.hedge = hedge
        read.live.append(request)
        self._enqueue(request)

    def _arrived(self, request: _Request, read: _Read) -> None:
        """The first bytes that came for this page; the other attempts have lost."""
        self.obs.record(HostHist.SWAP_IN, self.now_ns - read.started_ns)
        self.obs.count(HostCounter.DAEMON_READS)
        if request.hedge:
            self.obs.count(HostCounter.HEDGE_WINS)
        slot, copy = read.slot, request.copy
        self._done(
            read,
            request.frame,
            ok=True,
            xxh3=self.copies.xxh3(copy),
            copy=copy,
            rewrite=self._lacks(slot, read.hvp),
        )
        self._give_up_waiting(read, but=request)

    def _done(self, read: _Read, frame: int, *, ok: bool, xxh3: int, copy: int, rewrite: bool) -> None:
        """Say how a read ended. The vm machine hears first whose frame the page is in, then which frames are free."""
        read.done = True
        del self._reads[read.hvp]
        self.emit(SwapInDone(read.hvp, read.slot, frame, ok, xxh3, copy, rewrite))
        for spare in read.spare:
            self.emit(FrameBack(spare))
        read.spare.clear()

    def _lacks(self, slot: int, hvp: int) -> bool:
        """Whether the slot has fewer copies than it could have: one proved bad, or could not be written then."""
        if any(strikes >= STRIKES_MAX for strikes in self._strikes.get(hvp, {}).values()):
            return True
        if self.copies.replicas == 1 or self.copies.good(slot) != 1:
            return False
        holder = self.copies.copies(slot)[0] // SLOTS_PER_DAEMON
        return any(daemon.state is _UP for d, daemon in enumerate(self.daemons) if d != holder)

    def _drop(self, request: _Request) -> None:
        """Nothing can land in this attempt's frame any more, and nobody waits for it."""
        self.copies.unname(request.copy)
        self.emit(FrameBack(request.frame))

    def _read_failed(self, request: _Request, read: _Read) -> None:
        """The device gave this attempt up. Another one that is under way may still bring the page."""
        read.live.remove(request)
        self.copies.unname(request.copy)
        if read.live:
            read.spare.append(request.frame)
            self._count_strike(read, request.copy)
        else:
            self._strike(read, request.copy, request.frame)

    def _strike(self, read: _Read, copy: int, frame: int) -> None:
        """A copy was read in vain, and nobody else is asked: again, or another copy, or nobody."""
        given_up = self._count_strike(read, copy)
        if given_up or not self._is_up(copy // SLOTS_PER_DAEMON) or copy not in self.copies.copies(read.slot):
            self._ask_best(read, frame)
        else:
            self.obs.count(HostCounter.IO_RETRIES)
            self._ask(read, copy, frame)

    def _count_strike(self, read: _Read, copy: int) -> bool:
        """True when the copy is given up, and its block with it."""
        strikes = self._strikes.setdefault(read.hvp, {})
        strikes[copy] = strikes.get(copy, 0) + 1
        if strikes[copy] < STRIKES_MAX:
            return False
        if self.copies.quarantine(read.slot, copy):
            self.obs.count(HostCounter.QUARANTINED)
            self.obs.trace(Kind.COPY_BAD, a=read.hvp, b=copy)
        return True

    # -- second attempts -----------------------------------------------------------------------------------
    def _other_copy(self, read: _Read) -> int:
        """A copy on a daemon that is up and is not asked for this page; -1: none."""
        asked = [request.copy for request in read.live]
        for copy in self.copies.copies(read.slot):
            if copy not in asked and self._is_up(copy // SLOTS_PER_DAEMON):
                return copy
        return -1

    def _ask_another(self, read: _Read, *, hedge: bool) -> None:
        """Ask another copy while an attempt may still land: with a frame of its own."""
        if read.done or read.wants_frame or self._other_copy(read) < 0:
            return
        read.hedge = hedge
        if read.spare:
            self._second(read, read.spare.pop())
        else:
            read.wants_frame = True
            self.emit(LendFrame(read.hvp))

    def _frame_lent(self, event: FrameLent) -> None:
        read = self._reads.get(event.hvp)
        wanted = read is not None and read.wants_frame
        if read is not None:
            read.wants_frame = False
        if event.frame < 0:
            self.obs.count(HostCounter.FRAMES_REFUSED)
        elif read is None or not wanted or self._other_copy(read) < 0:
            self.emit(FrameBack(event.frame))
        else:
            self._second(read, event.frame)

    def _second(self, read: _Read, frame: int) -> None:
        self.obs.count(HostCounter.HEDGED if read.hedge else HostCounter.REPLICA_READS)
        self._ask(read, self._other_copy(read), frame, read.hedge)

    def _turn_to_others(self, index: int) -> None:
        """A daemon is not up: pages that have another copy come from there, at once."""
        daemon = self.daemons[index]
        for request in list(daemon.queue):
            read = request.job
            if isinstance(read, _Read) and (copy := self._other_copy(read)) >= 0:
                # It was never sent, or fenced: its frame can go along.
                daemon.queue.remove(request)
                read.live.remove(request)
                self.copies.unname(request.copy)
                self.obs.count(HostCounter.REPLICA_READS)
                self._ask(read, copy, request.frame)
        for request in list(daemon.out.values()):
            if isinstance(request.job, _Read) and len(request.job.live) == 1:
                self._ask_another(request.job, hedge=False)

    # -- writes --------------------------------------------------------------------------------------------
    def _swap_out(self, event: SwapOut) -> None:
        copies = self.copies
        slot = copies.rewrite(event.slot, self._answers) if event.slot >= 0 else copies.take(self._answers)
        if slot < 0:
            self.emit(SwapOutDone(event.serial, event.hvp, -1, event.frame, ok=False, full=True))
            return
        write = _Write(event, slot)
        for copy in copies.copies(slot):
            write.left += 1
            self._enqueue(_Request(self._new_id(OP_WRITE), OP_WRITE, copy, event.frame, write))

    def _copy_written(self, request: _Request, write: _Write, *, ok: bool) -> None:
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
    def _is_up(self, index: int) -> bool:
        return self.daemons[index].state is _UP

    def _answers(self, index: int) -> bool:
        """Up, and what was asked of it first is not long overdue: a daemon may be silent for long before it is given up."""
        daemon = self.daemons[index]
        if daemon.state is not _UP:
            return False
        oldest = next(iter(daemon.out.values()), None)
        return oldest is None or self.now_ns - oldest.since_ns < RESEND_NS

    def _new_id(self, op: int) -> int:
        """Rising; the lowest bit says what is asked for, so that also a reply to a forgotten request can be read (`op_of`)."""
        ident = self._next_id
        self._next_id += 2
        return ident | op

    def _enqueue(self, request: _Request) -> None:
        self.copies.name(request.copy)
        self.daemons[request.copy // SLOTS_PER_DAEMON].queue.append(request)

    def settled(self, daemon: int) -> int:
        """Ids of this daemon below it are answered and will not be asked for again."""
        one = self.daemons[daemon]
        return min([*one.out, *(request.id for request in one.queue)], default=self._next_id)

    def _send(self, index: int, daemon: _Daemon, request: _Request) -> None:
        request.attempts += 1
        request.sent_epoch = daemon.epoch
        request.since_ns = self.now_ns
        daemon.out[request.id] = request
        self._emit_io(index, daemon, request)

    def _emit_io(self, index: int, daemon: _Daemon, request: _Request) -> None:
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
        while self._hedges and self._hedges[0][0] <= self.now_ns:
            read = self._hedges.popleft()[1]
            if len(read.live) == 1:
                self._ask_another(read, hedge=True)

    # -- replies -------------------------------------------------------------------------------------------
    def _reply(self, event: IoReply) -> None:
        daemon = self.daemons[event.daemon]
        request = daemon.out.get(event.request)
        if request is None or event.epoch != daemon.epoch or request.sent_epoch != event.epoch:
            self.obs.count(HostCounter.STALE_REPLIES)
            return
        del daemon.out[event.request]
        job = request.job
        if isinstance(job, _Read) and job.done:
            self._drop(request)
            return
        ok = event.result == PAGE_SIZE
        if not ok and request.attempts < ATTEMPTS_MAX:
            self.obs.count(HostCounter.IO_RETRIES)
            # The daemon has answered the old id and would answer the same again.
            request.id = self._new_id(request.op)
            daemon.queue.append(request)
            return
        if not ok:
            self.obs.count(HostCounter.IO_ERRORS)
        if isinstance(job, _Write):
            self.obs.count(HostCounter.DAEMON_WRITES)
            self._copy_written(request, job, ok=ok)
        elif ok:
            self.copies.unname(request.copy)
            self._arrived(request, job)
        else:
            self.obs.count(HostCounter.DAEMON_READS)
            self._read_failed(request, job)

    # -- daemons -------------------------------------------------------------------------------------------
    def _daemon_up(self, event: DaemonUp) -> None:
        daemon = self.daemons[event.daemon]
        if event.epoch < daemon.epoch or daemon.state is not DaemonState.FENCED:
            raise MachineError(
                f"daemon {event.daemon} epoch {event.epoch} came up before epoch {daemon.epoch} was fenced"
            )
        again = event.epoch > 0
        daemon.epoch = event.epoch
        daemon.state = DAEMON.go(daemon.state, "hello")
        if again:
            self.obs.count(HostCounter.RESTARTS)
            self.obs.count(HostCounter.OUTAGE_NS, self.now_ns - self._outage_since_ns[event.daemon])
        self.obs.trace(Kind.DAEMON_UP, a=event.daemon, b=event.epoch)
        for index, other in enumerate(self.daemons):
            if other.state is not _UP:
                self._turn_to_others(index)

    def _daemon_lost(self, event: DaemonLost) -> None:
        daemon = self.daemons[event.daemon]
        was_up = event.epoch == daemon.epoch and daemon.state is DaemonState.UP
        daemon.state = DAEMON.go(daemon.state, "lose")
        if not was_up:
            # It died before it said HELLO: nothing was sent to it.
            self._outage_since_ns[event.daemon] = self._outage_since_ns[event.daemon] or self.now_ns
            return
        self._outage_since_ns[event.daemon] = self.now_ns
        self.obs.trace(Kind.DAEMON_DOWN, a=event.daemon, b=event.epoch)
        self._turn_to_others(event.daemon)

    def _daemon_fenced(self, event: DaemonFenced) -> None:
        """From here no byte of the old epoch can land: what is still wanted of it is sent again, oldest first, into the same frames."""
        daemon = self.daemons[event.daemon]
        daemon.state = DAEMON.go(daemon.state, "fence")
        self.obs.count(HostCounter.FENCES)
        self.obs.trace(Kind.FENCED, a=event.daemon, b=event.epoch)
        again: list[_Request] = []
        for request in daemon.out.values():
            job = request.job
            if isinstance(job, _Read) and job.done:
                self._drop(request)
            elif isinstance(job, _Read) and len(job.live) > 1:
                job.live.remove(request)
                self.copies.unname(request.copy)
                job.spare.append(request.frame)
            else:
                request.attempts -= 1
                again.append(request)
        daemon.out.clear()
        daemon.queue.extendleft(reversed(again))
        self._turn_to_others(event.daemon)
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
            if isinstance(request.job, _Write):
                self._copy_written(request, request.job, ok=False)
            else:
                self._no_longer_there(request, request.job)

    def _no_longer_there(self, request: _Request, read: _Read) -> None:
        read.live.remove(request)
        self.copies.unname(request.copy)
        if read.live:
            read.spare.append(request.frame)
        else:
            self._ask_best(read, request.frame)
