"""The clock of one guest CPU: operations executed, costs, and time held in the host, which the guest cannot tell from running.

Invariant: every nanosecond is in exactly one of the CPU's counters (running, blocked, halted, idle), and the current task, if there is
one, is charged for it.

Not handled here: what a stay in guest mode is worth (guest/pacing.py), timer ticks (guest/sched.py).
"""

from __future__ import annotations

from typing import Final

from guest.accounting import Accounting
from guest.sched import RunQueue
from proto.layout import VC_BLOCKED_NS, VC_HALTED_NS, VC_IDLE_NS, VC_RUNNING_NS, VC_VCLOCK_NS
from proto.wire import Held

_HELD_COUNTER: Final[dict[int, int]] = {
    Held.BLOCKED: VC_BLOCKED_NS,
    Held.HALTED: VC_HALTED_NS,
    Held.IDLE: VC_IDLE_NS,
}


class Clock:
    """Guest time of one CPU; it goes on through resets and reboots, which are nothing to an emulator's accounts."""

    __slots__ = ("_acc", "_queue", "vclock_ns")

    def __init__(self, acc: Accounting, queue: RunQueue) -> None:
        self._acc = acc
        self._queue = queue
        self.vclock_ns = 0

    def spend(self, ns: int) -> None:
        """Guest time that passes on this CPU while it runs."""
        if ns:
            self._pass(VC_RUNNING_NS, ns)

    def held(self, kind: int, ns: int) -> None:
        """Guest time that passed in the host (``kind``: Held). The guest cannot tell, so the current task pays."""
        counter = _HELD_COUNTER.get(kind)
        if counter is not None:
            self._pass(counter, ns)

    def _pass(self, counter: int, ns: int) -> None:
        self.vclock_ns += ns
        self._acc.set(VC_VCLOCK_NS, self.vclock_ns)
        self._acc.add(counter, ns)
        self._queue.charge(ns)
