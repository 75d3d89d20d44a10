"""Interrupts of one CPU: which are pending, when they are taken, what their handlers do, and those that this CPU sends to others.

An entry brings all that is pending, and replaces what was. APICv: neither taking an interrupt nor its EOI is an exit; the next exit
record tells both.

Invariants
* Kernel code runs with interrupts off; they are on in tasks that have IF=1, in the idle loop and in the halt loop, and only there
  pending interrupts are taken.
* A paced CPU that is behind the wall clock takes an interrupt when its own clock has come to the moment it arrived. Otherwise a CPU that
  spends its wall time on exits would see the next page arrive before it executed anything, and its other tasks would starve for a cost
  that only the emulator has.

Not handled here: priorities (the host packs the vectors, highest first), exceptions (guest/execution.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from proto.kvm import VECTOR_CALL, VECTOR_PAGE_READY, VECTOR_RESCHEDULE, VECTOR_TIMER
from proto.layout import T_IF, VC_IPIS
from proto.machine import Path
from proto.trace import Kind
from proto.wire import Entry, ExitReason, Held, unpack_vectors

if TYPE_CHECKING:
    from guest.machine import GuestCpu

VECTOR_MASK: Final = 0xFF


class Interrupts:
    """See the module docstring."""

    __slots__ = ("_accepted", "_cpu", "_eois", "gate_ns", "irr")

    def __init__(self, cpu: GuestCpu) -> None:
        self._cpu = cpu
        self.irr = 0
        """Pending interrupt vectors, packed as in the entry record."""
        self.gate_ns = 0
        """Guest time before which a pending interrupt is not taken."""
        self._accepted = 0
        """Vectors taken since the last exit, packed."""
        self._eois = 0

    def forget(self) -> None:
        """The CPU was reset."""
        self.irr = self.gate_ns = self._accepted = self._eois = 0

    # ---- between host and CPU -----------------------------------------------------------------------------------------------
    def arrived(self, entry: Entry, at_ns: int) -> None:
        """An entry brought what is pending now; ``at_ns``: the guest time that goes with its arrival."""
        clock = self._cpu.clock
        if entry.irr and not self.irr:
            self.gate_ns = 0 if entry.held_kind == Held.HALTED else at_ns
        elif entry.held_kind == Held.HALTED and clock.vclock_ns < self.gate_ns:
            # The interrupt that waits for this CPU's clock has ended the halt: until then the CPU was halted (I49).
            clock.held(Held.HALTED, self.gate_ns - clock.vclock_ns)
        if VECTOR_CALL in unpack_vectors(entry.irr):
            # Another CPU waits for this one: it is not the emulator's lag that may decide when it is taken.
            self.gate_ns = 0
        self.irr = entry.irr

    def told(self) -> tuple[int, int]:
        """(vectors taken, EOIs done) since this was asked last, for an exit record."""
        told = self._accepted & 0xFFFF_FFFF, self._eois
        self._accepted = self._eois = 0
        return told

    # ---- when ---------------------------------------------------------------------------------------------------------------
    def on(self) -> bool:
        """Whether the CPU takes interrupts in what it does now: its current task, or idling."""
        task = self._cpu.queue.current
        return task < 0 or self._cpu.tasks.load(task, T_IF) != 0

    def gated(self) -> bool:
        """Whether what is pending waits for this CPU's clock."""
        return self.irr != 0 and self._cpu.clock.vclock_ns < self.gate_ns

    def due(self) -> bool:
        """Whether the CPU's clock has come to what is pending. An idle CPU skips the time in between."""
        clock, queue = self._cpu.clock, self._cpu.queue
        if clock.vclock_ns < self.gate_ns and queue.current < 0 and not queue.need_resched:
            if queue.scan() >= 0:
                return False
            clock.held(Held.IDLE, self.gate_ns - clock.vclock_ns)
        return clock.vclock_ns >= self.gate_ns

    # ---- what ---------------------------------------------------------------------------------------------------------------
    def take(self) -> Path:
        """Take what is pending, highest priority first. Interrupts are on when this is called, off in the handlers."""
        cpu = self._cpu
        before, cpu.acc.interrupts = cpu.acc.interrupts, 0
        while self.irr:
            vector = self.irr & VECTOR_MASK
            self.irr >>= 8
            self._accepted = self._accepted << 8 | vector
            self._eois += 1
            cpu.clock.spend(cpu.config.interrupt_cost_ns)
            cpu.acc.event(Kind.G_IRQ, 0, vector)
            if vector == VECTOR_PAGE_READY:
                yield from cpu.apf.ready_interrupt()
            elif vector == VECTOR_TIMER:
                cpu.queue.tick(cpu.clock.vclock_ns)
            elif vector == VECTOR_RESCHEDULE:
                cpu.queue.note_wake()
            elif vector == VECTOR_CALL:
                yield from cpu.hotplug.called()
        cpu.acc.interrupts = before

    def send(self, vcpu_id: int, vector: int) -> Path:
        """Interrupt another CPU of this guest."""
        cpu = self._cpu
        cpu.acc.add(VC_IPIS)
        cpu.acc.event(Kind.IPI, 0, vcpu_id, vector)
        yield from cpu.exits.take_undisturbed(ExitReason.IPI, arg0=vcpu_id, arg1=vector)
