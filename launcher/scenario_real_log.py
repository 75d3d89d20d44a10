"""What a scenario's guest says, as events of the guest that the checker reads.

The scenario's guest has no sleeper table of its own kernel's form: a task that was told sleeps on its token, a wake-up that finds
nobody is forgotten. So nodes are waits and wakes without dummies.
"""

from __future__ import annotations

from typing import Final

from proto import kvm
from proto.events import Kind
from proto.trace_writer import TraceWriter
from proto.units import TOKEN_WAKE_ALL
from sim.events import Said

VECTOR_PF: Final = 14
WAKE_ONE, WAKE_BROADCAST = 0, 2
USER_CPL: Final = 3


class GuestLog:
    """Logs for one vCPU. The guest says what it did before it leaves guest mode, so the host acts on it only afterwards."""

    def __init__(self, trace: TraceWriter, vcpu_id: int, *, ready_by_interrupt: bool) -> None:
        self._trace = trace
        self._vcpu_id = vcpu_id
        self._by_interrupt = ready_by_interrupt
        self._asleep: dict[int, int] = {}
        """Task by token."""
        self._ready = 0

    def say(self, said: Said) -> None:
        """Log what follows from a line of the guest's own log."""
        token, task = said.fields.get("token", 0), said.fields["task"]
        if said.name == "NOTPRES":
            self._event(Kind.G_CLEAR, token, kvm.AREA_FLAGS, kvm.REASON_NOT_PRESENT)
            self._event(Kind.G_NP, token, task + 1, token, USER_CPL)
            self._event(Kind.G_WAIT, token, task + 1, task)
            self._asleep[token] = task
        elif said.name == "READY":
            self._take(token)
        elif said.name == "OFFLINE":
            for one, sleeper in self._asleep.items():
                self._event(Kind.G_WAKE, one, sleeper + 1, sleeper, WAKE_BROADCAST)
            self._asleep.clear()
        elif said.name == "START":
            # After a reset: whoever slept here is gone with the kernel that knew it.
            self._asleep.clear()
        elif said.name == "CLEAR":
            offset = kvm.AREA_TOKEN if self._by_interrupt else kvm.AREA_FLAGS
            self._event(
                Kind.G_CLEAR, self._ready, offset, self._ready if self._by_interrupt else kvm.REASON_READY
            )

    def _take(self, token: int) -> None:
        self._ready = token
        self._event(
            Kind.G_IRQ,
            0 if self._by_interrupt else token,
            kvm.VECTOR_PAGE_READY if self._by_interrupt else VECTOR_PF,
        )
        everybody = token == TOKEN_WAKE_ALL
        for one in list(self._asleep) if everybody else [token] if token in self._asleep else []:
            task = self._asleep.pop(one)
            self._event(Kind.G_WAKE, one, task + 1, task, WAKE_BROADCAST if everybody else WAKE_ONE)

    def _event(self, kind: Kind, token: int, a: int, b: int = 0, c: int = 0) -> None:
        self._trace.event(kind, self._vcpu_id, 0, token, a, b, c)
