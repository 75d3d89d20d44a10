"""The swap machine: which slot holds which bytes, what is asked of which daemon, and what an answer may still mean.

The host owns the swap map, as a kernel does; a daemon owns only bytes. Slots are numbered daemon * SLOTS_PER_DAEMON + block.

Invariants
* A request is known by its id; it is answered once, whoever answers how often. A reply of another epoch, or of an id that is not
  in flight, is counted and dropped. What is not answered for `RESEND_NS` is sent again under the same id, which a daemon does only once;
  an attempt that failed is asked for again under a new id.
* Killing a daemon is not a fence: from `DaemonLost` to `DaemonFenced` its unanswered requests keep their frames and slots, and
  nothing is sent in their place. Only a new epoch after the fence gets them again, with the same id, slot and frame: then nobody
  else can write there.
* A slot's checksum is the one of the last acknowledged write. A slot is reused only after every request that names it was answered
  or fenced.
* At most WINDOW requests per daemon are out; the rest waits here in order, so a daemon that stops reading costs no memory elsewhere.

Deliberately not here: restarting daemons (launcher), checking the bytes (host/vm.py compares the sum).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from host.events import (
    DaemonFenced,
    DaemonLost,
    DaemonUp,
    IoReply,
    LookAtRequests,
    SendIo,
    SlotFree,
    SwapIn,
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

SLOTS_PER_DAEMON: Final = 1 << 28
"""1 TiB of swap per daemon."""
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


class _Request:
    """One read or write from its start to its answer."""

    __slots__ = (
        "attempts",
        "daemon",
        "frame",
        "hvp",
        "id",
        "op",
        "sent_epoch",
        "sent_ns",
        "serial",
        "slot",
        "started_ns",
        "xxh3",
    )

    def __init__(self, ident: int, op: int, slot: int, frame: int, hvp: int, now_ns: int) -> None:
        self.id = ident
        self.op = op
        self.slot = slot
        self.daemon = slot // SLOTS_PER_DAEMON
        self.frame = frame
        self.hvp = hvp
        self.serial = 0
        self.xxh3 = 0
        self.attempts = 0
        self.sent_epoch = -1
        self.sent_ns = 0
        self.started_ns = now_ns


class _Daemon:
    """What the host knows of one daemon: slots as a stack and a column of sums, requests waiting and out."""

    __slots__ = ("epoch", "free", "free_count", "out", "queue", "state", "sums")

    def __init__(self, slots: int) -> None:
        self.free = np.arange(slots - 1, -1, -1, dtype=np.int64)
        self.free_count = slots
        self.sums = np.zeros(slots, np.uint64)
        self.queue: deque[_Request] = deque()
        self.out: dict[int, _Request] = {}
        self.epoch = 0
        self.state = DaemonState.FENCED


class SwapMachine(Machine):
    """All daemons of a run. ``slots``: blocks of each daemon's file."""

    def __init__(self, slots: Sequence[int], observer: Observer) -> None:
        super().__init__()
        self.obs = observer
        self.daemons = [_Daemon(n) for n in slots]
        self._next_id = 2
        self._turn = 0
        self._outage_since_ns = [0] * len(self.daemons)
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            SwapIn: self._swap_in,
            SwapOut: self._swap_out,
            SlotFree: self._slot_free,
            IoReply: self._reply,
            LookAtRequests: self._look_at_requests,
            DaemonUp: self._daemon_up,
            DaemonLost: self._daemon_lost,
            DaemonFenced: self._daemon_fenced,
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

    @property
    def slots_used(self) -> int:
        """Slots that hold a page or are named by a request."""
        return sum(len(d.free) - d.free_count for d in self.daemons)

    @property
    def outstanding(self) -> int:
        """Requests waiting or out."""
        return sum(len(d.queue) + len(d.out) for d in self.daemons)

    def landing_frame(self, daemon: int, request: int) -> int | None:
        """Where the page of a read in flight belongs; None for a write or an id that is not in flight."""
        found = self.daemons[daemon].out.get(request)
        return found.frame if found is not None and found.op == OP_READ else None

    # -- requests of the vm machine ------------------------------------------------------------------------
    def _swap_in(self, event: SwapIn) -> None:
        self._enqueue(
            _Request(self._new_id(OP_READ), OP_READ, event.slot, event.frame, event.hvp, self.now_ns)
        )

    def _swap_out(self, event: SwapOut) -> None:
        slot = event.slot if event.slot >= 0 else self._take_slot()
        if slot < 0:
            self.emit(SwapOutDone(event.serial, event.hvp, -1, event.frame, ok=False, full=True))
            return
        request = _Request(self._new_id(OP_WRITE), OP_WRITE, slot, event.frame, event.hvp, self.now_ns)
        request.serial = event.serial
        request.xxh3 = event.xxh3
        self._enqueue(request)

    def _slot_free(self, event: SlotFree) -> None:
        index, block = divmod(event.slot, SLOTS_PER_DAEMON)
        daemon = self.daemons[index]
        daemon.free[daemon.free_count] = block
        daemon.free_count += 1

    def _take_slot(self) -> int:
        """A free slot, daemons in turn; -1 when all are full."""
        for _ in self.daemons:
            index = self._turn
            self._turn = (index + 1) % len(self.daemons)
            daemon = self.daemons[index]
            if daemon.free_count:
                daemon.free_count -= 1
                return index * SLOTS_PER_DAEMON + int(daemon.free[daemon.free_count])
        return -1

    def _new_id(self, op: int) -> int:
        """Rising; the lowest bit says what is asked for, so that also a reply to a forgotten request can be read (`op_of`)."""
        ident = self._next_id
        self._next_id += 2
        return ident | op

    def _enqueue(self, request: _Request) -> None:
        self.daemons[request.daemon].queue.append(request)

    def settled(self, daemon: int) -> int:
        """Ids of this daemon below it are answered and will not be asked for again."""
        one = self.daemons[daemon]
        return min([*one.out, *(request.id for request in one.queue)], default=self._next_id)

    def _send(self, index: int, daemon: _Daemon, request: _Request) -> None:
        request.attempts += 1
        request.sent_epoch = daemon.epoch
        daemon.out[request.id] = request
        self._emit_io(index, daemon, request)

    def _emit_io(self, index: int, daemon: _Daemon, request: _Request) -> None:
        request.sent_ns = self.now_ns
        self.emit(
            SendIo(
                index, daemon.epoch, request.id, request.op, request.slot % SLOTS_PER_DAEMON, request.frame
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

    # -- replies -------------------------------------------------------------------------------------------
    def _reply(self, event: IoReply) -> None:
        daemon = self.daemons[event.daemon]
        request = daemon.out.get(event.request)
        if request is None or event.epoch != daemon.epoch or request.sent_epoch != event.epoch:
            self.obs.count(HostCounter.STALE_REPLIES)
            return
        del daemon.out[event.request]
        ok = event.result == PAGE_SIZE
        if not ok and request.attempts < ATTEMPTS_MAX:
            self.obs.count(HostCounter.IO_RETRIES)
            # The daemon has answered the old id and would answer the same again.
            request.id = self._new_id(request.op)
            daemon.queue.append(request)
            return
        if not ok:
            self.obs.count(HostCounter.IO_ERRORS)
        self._finish(request, daemon, ok)

    def _finish(self, request: _Request, daemon: _Daemon, ok: bool) -> None:
        block = request.slot % SLOTS_PER_DAEMON
        if request.op == OP_READ:
            self.obs.record(HostHist.SWAP_IN, self.now_ns - request.started_ns)
            self.obs.count(HostCounter.DAEMON_READS)
            self.emit(SwapInDone(request.hvp, request.slot, request.frame, ok, int(daemon.sums[block])))
            return
        self.obs.count(HostCounter.DAEMON_WRITES)
        if ok:
            daemon.sums[block] = request.xxh3
            self.emit(
                SwapOutDone(request.serial, request.hvp, request.slot, request.frame, ok=True, full=False)
            )
            return
        # The block may be half written: nobody reads it again before it is written again.
        self._slot_free(SlotFree(request.slot))
        self.emit(SwapOutDone(request.serial, request.hvp, -1, request.frame, ok=False, full=False))

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

    def _daemon_fenced(self, event: DaemonFenced) -> None:
        """From here no byte of the old epoch can land: its unanswered requests are sent again, oldest first, into the same frames."""
        daemon = self.daemons[event.daemon]
        daemon.state = DAEMON.go(daemon.state, "fence")
        self.obs.count(HostCounter.FENCES)
        self.obs.count(HostCounter.RESENT, len(daemon.out))
        self.obs.trace(Kind.FENCED, a=event.daemon, b=event.epoch)
        for request in reversed(list(daemon.out.values())):
            request.attempts -= 1
            daemon.queue.appendleft(request)
        daemon.out.clear()
