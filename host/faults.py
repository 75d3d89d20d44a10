"""What goes wrong on purpose in the host, and by its hand: links to daemons, and processes at steps that the host sees.

A message is dropped, doubled or held back where the shell sends it or has received it; the machines never know. A process that is to die or
to stop at a step is signalled at once, through a descriptor (pidfd) that was opened when it said HELLO, so that the number of a process
that has ended can never hit another.

Invariants: what happens is recorded before it does; only processes of this run's zygote are ever signalled, and the zygote itself.

Not handled here: when a fault is due (proto/faults.py), what daemons do to themselves (swapd/faulty.py), faults by time that hit
processes, and the end of a stop (launcher/chaos.py).
"""

from __future__ import annotations

import contextlib
import heapq
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

from proto.events import Kind
from proto.faults import KINDS, PROCESS_KINDS, STEPS, FaultMachine, Firing, Spec, target_code
from proto.trace_writer import TraceWriter

SIGNALS: Final = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
LOOK_NS: Final = 20_000_000
"""How late a time may be noticed at which a connection is to be closed."""

Action = Callable[[], object]


class HostFaults:
    """See the module. ``elsewhere``: daemons whose connection the host closes itself, by ``disconnect(number, until_ns)``."""

    def __init__(
        self,
        machine: FaultMachine,
        writer: TraceWriter,
        elsewhere: frozenset[int],
        disconnect: Callable[[int, int], None],
    ) -> None:
        self.machine = machine
        self._writer = writer
        self._elsewhere = elsewhere
        self._disconnect = disconnect
        self._pidfds: dict[tuple[str, int], int] = {}
        self._dying: set[tuple[str, int]] = set()
        """Killed here: that takes a moment, and nobody dies twice."""
        self._held: list[tuple[int, int, Action]] = []
        self._order = 0
        self._processes = [
            spec
            for spec in machine.specs
            if spec.kind in PROCESS_KINDS and spec.step and STEPS[spec.step].seen_by == "host"
        ]
        self._disconnects = any(spec.kind == "disconnect" for spec in machine.specs) and bool(elsewhere)

    # -- processes -----------------------------------------------------------------------------------------
    def hello(self, role: str, number: int, pid: int) -> None:
        """A process has said who it is."""
        if not any(spec.role == role for spec in self._processes) or not _is_sibling(pid):
            return
        with contextlib.suppress(ProcessLookupError):
            self._put_pidfd(role, number, os.pidfd_open(pid))

    def _put_pidfd(self, role: str, number: int, fd: int) -> None:
        if (old := self._pidfds.pop((role, number), None)) is not None:
            os.close(old)
        self._pidfds[role, number] = fd
        self._dying.discard((role, number))

    def step(self, name: str, role: str, number: int, now_ns: int, request: int = 0) -> None:
        """An occasion; this process may not survive it."""
        if not self.machine.step(name, role, number, now_ns):
            return
        for spec in self._processes:
            if spec.step == name and self.machine.pending(spec, now_ns):
                self._signal(spec, now_ns, request)

    def _signal(self, spec: Spec, now_ns: int, request: int) -> None:
        number = self.machine.target(spec)
        if spec.role == "host":
            self._record(self.machine.fire(spec, now_ns), request)
            os.kill(os.getpid(), SIGNALS[spec.kind])
            return
        if spec.role == "zygote" and (spec.role, number) not in self._pidfds:
            self._pidfds[spec.role, number] = os.pidfd_open(os.getppid())
        if (
            (fd := self._pidfds.get((spec.role, number))) is None
            or (spec.role, number) in self._dying
            or not _alive(fd)
        ):
            return  # a successor will come: it stays pending until the step is next seen
        self._record(self.machine.fire(spec, now_ns), request)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, SIGNALS[spec.kind])
        if spec.kind == "kill":
            self._dying.add((spec.role, number))

    def gone(self, daemon: int) -> None:
        """A daemon never comes back."""
        self.machine.gone(daemon)

    # -- links ---------------------------------------------------------------------------------------------
    def message(self, daemon: int, now_ns: int, deliver: Action, request: int = 0) -> None:
        """A message to or from a daemon: delivered as the schedule wants it."""
        self.step("link.message", "swapd", daemon, now_ns, request)
        copies, later_ns, firings = self.machine.deliver(daemon, now_ns)
        for firing in firings:
            self._record(firing, request)
        for _ in range(copies):
            if later_ns:
                self._order += 1
                heapq.heappush(self._held, (now_ns + later_ns, self._order, deliver))
            else:
                deliver()

    def turn(self, now_ns: int) -> None:
        """Deliver what was held back; close connections to daemons elsewhere."""
        while self._held and self._held[0][0] <= now_ns:
            heapq.heappop(self._held)[2]()
        if self._disconnects:
            for daemon in self._elsewhere:
                # One that is closed cannot be closed again: what else is due waits.
                if self.machine.open("disconnect", daemon, now_ns) is not None:
                    continue
                if (firing := self.machine.take("disconnect", "swapd", daemon, now_ns)) is not None:
                    self._record(firing, 0)
                    self._disconnect(daemon, now_ns + firing.spec.for_ns)

    def next_ns(self, now_ns: int) -> int | None:
        """When `turn` has something to do."""
        due = [self._held[0][0]] if self._held else []
        if self._disconnects:
            due.append(now_ns + LOOK_NS)
        return min(due, default=None)

    # -- the run -------------------------------------------------------------------------------------------
    def _record(self, firing: Firing, request: int) -> None:
        spec = firing.spec
        self._writer.event(
            Kind.FAULT, token=firing.nth, a=spec.number, b=KINDS.index(spec.kind),
            c=target_code(spec.role, firing.number), cause=request,
        )  # fmt: skip

    def close(self) -> None:
        """Let the descriptors go."""
        for fd in self._pidfds.values():
            os.close(fd)
        self._pidfds.clear()


def _is_sibling(pid: int) -> bool:
    """Whether the same zygote forked it: a message is no reason to signal anybody else."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (OSError, ValueError):
        return False
    return f"\nPPid:\t{os.getppid()}\n" in status


def _alive(pidfd: int) -> bool:
    """Whether the process has not ended; one that nobody has reaped yet has."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return not poller.poll(0)
