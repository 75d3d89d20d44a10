"""What goes wrong in a daemon on purpose: an engine whose device fails as the schedule says, and the daemon's own end.

Purpose: `DaemonFaults` counts this daemon's steps and does to its process what is due; `FaultyEngine` stands between the service and the
real engine and damages what comes back.

Invariants: every operation really takes place before anything is made of its result, so its frame is the request's own until the answer
leaves: only there a page is ever damaged, and nothing lands later than it would have. What happens is recorded before it does.

Not handled here: when a fault is due (proto/faults.py), links (host/faults.py; closing the connection: swapd/shell.py).
"""

from __future__ import annotations

import errno
import heapq
import os
import random
import signal
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from proto.events import Kind
from proto.faults import KINDS, PROCESS_KINDS, STEPS, BadBlocks, FaultMachine, Firing, target_code
from proto.trace_writer import TraceWriter
from proto.units import PAGE_SIZE
from swapd.engine import READ, RESULT

SIGNALS: Final = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
ERRORS: Final = {
    "read_error": errno.EIO, "bad_block": errno.EIO, "write_error": errno.EIO, "no_space": errno.ENOSPC, "device_gone": errno.ENODEV,
}  # fmt: skip
_ROLE: Final = "swapd"
SEEN_HERE: Final = frozenset(name for name, step in STEPS.items() if step.seen_by == _ROLE)
"""Steps at which the daemon acts itself."""


class Device(Protocol):
    """What is needed of an engine (swapd/engine.py)."""

    @property
    def eventfd(self) -> int:
        """Readable when there may be something to reap."""

    def submit(self, ops: np.ndarray) -> None:
        """Accept operations, u64[n, 4]: tag, op, slot, frame."""

    def reap(self) -> np.ndarray:
        """What is over: rows of `RESULT`."""

    def close(self) -> None:
        """Wait for what has begun."""


class DaemonFaults:
    """The faults of one incarnation of daemon number ``daemon``. ``seed``: of bits and places."""

    def __init__(
        self,
        machine: FaultMachine,
        daemon: int,
        seed: int,
        writer: TraceWriter,
        end: Callable[[int], None] | None = None,
    ) -> None:
        """end: sends a signal to this process; tests put another there."""
        self.machine = machine
        self.daemon = daemon
        self.bad = BadBlocks(machine.words, len(machine.specs), daemon)
        self._mine = [
            spec
            for spec in machine.specs
            if spec.kind in PROCESS_KINDS and spec.role == _ROLE and spec.step in SEEN_HERE
        ]
        self._seed = seed
        self._writer = writer
        self._end = end or (lambda number: os.kill(os.getpid(), number))

    def step(self, name: str, now_ns: int, request: int = 0) -> None:
        """An occasion; this process may not survive it."""
        if self.machine.step(name, _ROLE, self.daemon, now_ns):
            self.process(now_ns, request)

    def process(self, now_ns: int, request: int = 0) -> None:
        """Kill or stop this process, if a step of a daemon has made that due."""
        for spec in self._mine:
            if self.machine.target(spec) == self.daemon and self.machine.pending(spec, now_ns):
                self.record(self.machine.fire(spec, now_ns), request)
                self._end(SIGNALS[spec.kind])

    def take(self, kind: str, now_ns: int, request: int = 0) -> Firing | None:
        """A fault of this kind that happens now, or goes on: nth is 0 then. It is recorded when it begins."""
        if (firing := self.machine.take(kind, _ROLE, self.daemon, now_ns)) is not None:
            self.record(firing, request)
            return firing
        going_on = self.machine.open(kind, self.daemon, now_ns)
        return Firing(going_on, self.daemon, 0) if going_on is not None else None

    def record(self, firing: Firing, request: int) -> None:
        """Into the event file, before it happens."""
        spec = firing.spec
        self._writer.event(
            Kind.FAULT,
            token=firing.nth,
            a=spec.number,
            b=KINDS.index(spec.kind),
            c=target_code(spec.role, firing.number),
            cause=request,
        )

    def random(self, firing: Firing, request: int) -> random.Random:
        """The same choices for the same fault of the same run."""
        return random.Random(f"{self._seed} {firing.spec.number} {firing.nth} {request}")


class _Operation(NamedTuple):
    op: int
    slot: int
    frame: int


class FaultyEngine:
    """An engine whose device has the faults of a schedule. ``memory``: where its frames are, uint8[k * 4096].

    ``next_ns``: when something that was held back is over, None if nothing is; `reap` then has it.
    """

    def __init__(
        self,
        device: Device,
        memory: npt.NDArray[np.uint8],
        faults: DaemonFaults,
        clock: Callable[[], int],
    ) -> None:
        self.faults = faults
        self.next_ns: int | None = None
        self._device = device
        self._memory = memory
        self._clock = clock
        self._under_way: dict[int, _Operation] = {}
        self._held: list[tuple[int, int, int]] = []
        """A heap of (until, tag, result)."""

    @property
    def eventfd(self) -> int:
        """As of the engine."""
        return self._device.eventfd

    def submit(self, ops: np.ndarray) -> None:
        """See `swapd.engine.Engine.submit`; tags are unique among what is under way."""
        rows = [(int(tag), int(op), int(slot), int(frame)) for tag, op, slot, frame in ops.tolist()]
        for tag, op, slot, frame in rows:
            self._under_way[tag] = _Operation(op, slot, frame)
        self._device.submit(ops)
        now_ns = self._clock()
        for tag, op, _, _ in rows:
            self.faults.step("read.started" if op == READ else "write.started", now_ns, tag)

    def reap(self) -> np.ndarray:
        """See `swapd.engine.Engine.reap`."""
        now_ns = self._clock()
        over: list[tuple[int, int]] = []
        for tag, res in self._device.reap().tolist():
            slow = self.faults.take("slow", now_ns, tag)
            if slow is not None:
                heapq.heappush(self._held, (now_ns + slow.spec.slower_ns, tag, res))
            else:
                over.append((tag, res))
        while self._held and self._held[0][0] <= now_ns:
            _, tag, res = heapq.heappop(self._held)
            over.append((tag, res))
        self.next_ns = self._held[0][0] if self._held else None
        out = np.zeros(len(over), RESULT)
        for row, (tag, res) in enumerate(over):
            out[row] = tag, self._result(tag, res, now_ns)
        return out

    def _result(self, tag: int, res: int, now_ns: int) -> int:
        """What the daemon is told of an operation that is over."""
        operation = self._under_way.pop(tag)
        self.faults.step("read.done" if operation.op == READ else "write.done", now_ns, tag)
        self.faults.step("io.done", now_ns, tag)
        if self.faults.take("device_gone", now_ns, tag) is not None:
            return -ERRORS["device_gone"]
        # Whatever else is due waits for an operation that works.
        if res != PAGE_SIZE:
            return res
        if operation.op == READ:
            return self._read(operation, tag, now_ns)
        for kind in ("write_error", "no_space"):
            if self.faults.take(kind, now_ns, tag) is not None:
                return -ERRORS[kind]
        return res

    def _read(self, operation: _Operation, tag: int, now_ns: int) -> int:
        """A read that brought its page: one fault at most."""
        if operation.slot in self.faults.bad:
            return -ERRORS["bad_block"]
        if self.faults.take("bad_block", now_ns, tag) is not None:
            self.faults.bad.add(operation.slot)
            return -ERRORS["bad_block"]
        if self.faults.take("read_error", now_ns, tag) is not None:
            return -ERRORS["read_error"]
        at = operation.frame * PAGE_SIZE
        page = self._memory[at : at + PAGE_SIZE]
        if (firing := self.faults.take("short_read", now_ns, tag)) is not None:
            # What the device did not bring is whatever the frame held before; here surely nothing of the page.
            page[PAGE_SIZE // 2 :] = ~page[PAGE_SIZE // 2 :]
            return PAGE_SIZE // 2
        if (firing := self.faults.take("bit_flip", now_ns, tag)) is not None:
            rng = self.faults.random(firing, tag)
            page[rng.randrange(PAGE_SIZE)] ^= np.uint8(1 << rng.randrange(8))
        return PAGE_SIZE

    def close(self) -> None:
        """See `swapd.engine.Engine.close`."""
        self._device.close()
