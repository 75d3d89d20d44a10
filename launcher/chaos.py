"""The launcher's part of a schedule of faults, and what the guests got done while daemons were down.

Purpose: `Chaos` says which process is killed or stopped now because its time has come, which goes on again, and whose end was ordered
by somebody else's hand; `OutageMeter` splits the guests' work into that done while every daemon was up and that done while one was down.

Invariants: a time that passes while its target is down is passed over when the fault comes again and again; one that was to happen once
waits for its target. Pure: every call is told the time, and signals nobody.

Not handled here: how a process is signalled and started again (launcher/lifecycle.py), when a fault is due (proto/faults.py).
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from proto.faults import FIRED, KINDS, LAST_NS, ON, PROCESS_KINDS, FaultMachine, Firing, Spec, target_code
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
        self._known = dict.fromkeys((spec.number for spec in self._processes), 0)
        """Firings that were looked at, by fault."""
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
            fired, known = self.machine.word(spec, FIRED), self._known[spec.number]
            self._known[spec.number] = fired
            numbers = self._targets(spec, known, fired)
            if spec.kind == "stop":
                until_ns = self.machine.word(spec, LAST_NS) + spec.for_ns
                self._stopped += [_Stopped(until_ns, spec.role, number) for number in numbers]
            elif spec.step:
                found += [(spec, number) for number in numbers]
        return found

    def _targets(self, spec: Spec, known: int, fired: int) -> list[int]:
        """Whom it happened to since it had happened ``known`` times."""
        if spec.step:
            # One that waits for a step never passes a turn over, so its turns are its firings.
            return [spec.targets[nth % len(spec.targets)] for nth in range(known, fired)]
        # Done here, and looked at each time.
        return [self.machine.word(spec, ON)] * (fired > known)

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


@dataclass(slots=True)
class OutageMeter:
    """Guest work by outage state. `work` is the sum over all vCPUs, `connected` the host's count of daemons that came back.

    A daemon is down from the moment its end is known here until the host has connected its successor. The work of each interval
    goes to the state that held during it, so an interval never mixes both.
    """

    count: int = 0
    _up_ns: int = 0
    _down_ns: int = 0
    _up_work: int = 0
    _down_work: int = 0
    _last_ns: int = 0
    _last_work: int = 0
    _down: set[int] = field(default_factory=set)
    _connected_target: int = 0

    def is_down(self) -> bool:
        """Whether a daemon is down."""
        return bool(self._down)

    def begin(self, now_ns: int, work: int) -> None:
        """The barrier has opened."""
        self._last_ns, self._last_work = now_ns, work

    def sample(self, now_ns: int, work: int, connected: int) -> None:
        """Close the interval since the last call, and see whether the daemons are back."""
        if not self._last_ns:
            return
        if self._down:
            self._down_ns += now_ns - self._last_ns
            self._down_work += work - self._last_work
        else:
            self._up_ns += now_ns - self._last_ns
            self._up_work += work - self._last_work
        self._last_ns, self._last_work = now_ns, work
        if connected >= self._connected_target:
            self._down.clear()

    def down(self, daemon: int, now_ns: int, work: int, connected: int) -> None:
        """A daemon ended."""
        if not self._last_ns:
            return
        self.sample(now_ns, work, connected)
        if not self._down:
            self.count += 1
        self._down.add(daemon)
        # A daemon that died again before it was connected is one that is missing, not two.
        self._connected_target = connected + len(self._down)

    def summary(self) -> dict[str, Any]:
        """The `outage` table of the summary."""
        return {
            "count": self.count,
            "total_ms": round(self._down_ns / MS, 3),
            "work_per_100ms_up": _rate(self._up_work, self._up_ns),
            "work_per_100ms_down": _rate(self._down_work, self._down_ns),
        }


def _rate(work: int, time_ns: int) -> float | None:
    return round(work * 100 * MS / time_ns, 1) if time_ns else None
