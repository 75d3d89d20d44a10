"""The launcher's part of a schedule of faults.

Purpose: `Chaos` says which process is killed or stopped now because its time has come, which goes on again, and whose end was ordered
by somebody else's hand.

Invariants: a time that passes while its target is down is passed over when the fault comes again and again; one that was to happen once
waits for its target. A daemon that is gone for good is nobody's target. Pure: every call is told the time, and signals nobody.

Not handled here: how a process is signalled and started again (launcher/lifecycle.py), when a fault is due (proto/faults.py), what the
guests get done meanwhile (launcher/outage.py).
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Final, NamedTuple

from proto.faults import FIRED, KINDS, LAST_NS, PROCESS_KINDS, FaultMachine, Firing, Spec, target_code
from proto.topology import Topology
from proto.topology_faults import describe
from proto.trace import Kind
from proto.trace_writer import TraceWriter

MS = 1_000_000
SIGNALS: Final = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class Order(NamedTuple):
    """Signal a process: `Chaos.took` wants to know whether it was there."""

    spec: Spec
    role: str
    number: int
    signal: int


class _Stopped(NamedTuple):
    """A process that is to go on at ``until_ns``."""

    until_ns: int
    role: str
    number: int


class Chaos:
    """Faults of a run that kill or stop processes. ``writer``: the launcher's event file."""

    def __init__(self, topology: Topology, machine: FaultMachine, writer: TraceWriter | None) -> None:
        self.machine = machine
        self._faults = topology.fault
        self._writer = writer
        self._processes = [spec for spec in machine.specs if spec.kind in PROCESS_KINDS]
        self._timed = [spec for spec in self._processes if not spec.step]
        self._known = dict.fromkeys(
            ((spec.number, number) for spec in self._processes for number in spec.targets), 0
        )
        """Firings that were looked at, by fault and target."""
        self._stopped: list[_Stopped] = []

    @property
    def kills(self) -> int:
        """Processes killed so far."""
        return sum(self.machine.word(spec, FIRED) for spec in self._processes if spec.kind == "kill")

    def why(self, spec: Spec) -> str:
        """What ordered it, in words."""
        return (
            f"as fault {spec.number} of the schedule wants: {spec.kind} {describe(self._faults[spec.number])}"
        )

    def wakes_ns(self, now_ns: int) -> int | None:
        """When `due` or `over` may say something again."""
        due = [stopped.until_ns for stopped in self._stopped]
        if (next_ns := self.machine.next_ns(self._timed, now_ns)) is not None:
            due.append(next_ns)
        return min(due, default=None)

    @property
    def watches(self) -> bool:
        """Whether others may stop processes, which have to be looked for."""
        return any(spec.kind == "stop" and spec.step for spec in self._processes)

    def due(self, now_ns: int) -> list[Order]:
        """What is to be done now."""
        return [
            Order(spec, spec.role, self.machine.target(spec), SIGNALS[spec.kind])
            for spec in self._timed
            if self.machine.pending(spec, now_ns)
        ]

    def take(self, order: Order, now_ns: int) -> None:
        """It is about to be done: counted and recorded before."""
        self._record(self.machine.fire(order.spec, now_ns))

    def missed(self, order: Order, now_ns: int) -> None:
        """Its target was not there."""
        if order.spec.merges:
            self.machine.skip(order.spec, now_ns)

    def look(self) -> list[tuple[Spec, int]]:
        """Kills since the last look, by whoever's hand, with the number of the target. Stops are noted, to be ended."""
        found = []
        for spec in self._processes:
            numbers = self._targets(spec)
            if spec.kind == "stop":
                until_ns = self.machine.word(spec, LAST_NS) + spec.for_ns
                self._stopped += [_Stopped(until_ns, spec.role, number) for number in numbers]
            elif spec.step:
                found += [(spec, number) for number in numbers]
        return found

    def _targets(self, spec: Spec) -> list[int]:
        """Whom it happened to since the last look."""
        found = []
        for number in spec.targets:
            fired = self.machine.fired_at(spec, number)
            found += [number] * (fired - self._known[spec.number, number])
            self._known[spec.number, number] = fired
        return found

    def ended(self, role: str, number: int) -> None:
        """A process is gone: its successor stands still for what stops it, and not for what stopped this one."""
        self._stopped = [one for one in self._stopped if (one.role, one.number) != (role, number)]

    def over(self, now_ns: int) -> list[tuple[str, int]]:
        """Stopped processes that go on now."""
        over = [stopped for stopped in self._stopped if stopped.until_ns <= now_ns]
        self._stopped = [stopped for stopped in self._stopped if stopped.until_ns > now_ns]
        # Two stops of one process: the later one ends them.
        held = {(stopped.role, stopped.number) for stopped in self._stopped}
        return [(one.role, one.number) for one in over if (one.role, one.number) not in held]

    def _record(self, firing: Firing) -> None:
        if self._writer is not None:
            spec = firing.spec
            self._writer.event(
                Kind.FAULT, token=firing.nth, a=spec.number, b=KINDS.index(spec.kind), c=target_code(spec.role, firing.number)
            )  # fmt: skip

    def tick(self) -> None:
        """Keep the launcher's event file up to date."""
        if self._writer is not None:
            self._writer.tick()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


def process_faults(specs: Sequence[Spec]) -> bool:
    """Whether the launcher itself has something to do."""
    return any(spec.kind in PROCESS_KINDS and not spec.step for spec in specs)
