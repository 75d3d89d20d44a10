"""The phases of a run as one guest CPU sees them: before the start barrier, the measured time, after the stop.

The launcher opens the barrier and sets the stop flag in the control segment; a CPU notes both when it first sees them, for the figures
are about the time between.

Invariants
* A task that waits at the barrier, or arrives there while it opens, is released: the flag is looked at again after its new state.
* The counters of arrived and finished tasks only grow until the barrier opens, so whoever changes one last reports the final sum.
* A run that is stopped before its barrier opens holds nobody at it.

Not handled here: opening the barrier (launcher), the tasks that wait at it (guest/sched.py `open_barrier`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guest.registers import Registers
from proto.layout import (
    CTL_BARRIER,
    CTL_STOP,
    K_AT_BARRIER,
    K_DONE,
    VC_BARRIER_VCLOCK_NS,
    VC_BARRIER_WALL_NS,
    VC_END_VCLOCK_NS,
    VC_END_WALL_NS,
)
from proto.machine import Path
from proto.port import MemoryPort
from proto.trace import Kind
from proto.wire import HC_AT_BARRIER, ExitReason

if TYPE_CHECKING:
    from guest.machine import GuestCpu


class Phases:
    """``control``: page 0 of the control segment (read only)."""

    __slots__ = ("_control", "_cpu", "_end_seen", "_stop_seen", "barrier_open")

    def __init__(self, cpu: GuestCpu, control: MemoryPort) -> None:
        self._cpu = cpu
        self._control = control
        self.barrier_open = False
        self._stop_seen = False
        self._end_seen = False

    def registers(self) -> dict[str, int]:
        """What a fresh CPU needs to go on, as fields of `Registers`."""
        return {
            "barrier_open": self.barrier_open,
            "stop_seen": self._stop_seen,
            "end_seen": self._end_seen,
        }

    def set_registers(self, saved: Registers) -> None:
        """Go on from there."""
        self.barrier_open = bool(saved.barrier_open)
        self._stop_seen = bool(saved.stop_seen)
        self._end_seen = bool(saved.end_seen)

    def skip_since(self, saved_ns: int) -> None:
        """The CPU stood still from ``saved_ns`` on: as if the barrier had opened so much later, so that differences of wall time do not
        contain the time between.
        """
        cpu = self._cpu
        if opened_ns := cpu.acc.get(VC_BARRIER_WALL_NS):
            cpu.acc.set(VC_BARRIER_WALL_NS, max(1, opened_ns + cpu.now_ns - saved_ns))

    def look(self) -> None:
        """Barrier and stop flag: noted when this CPU first sees them."""
        cpu = self._cpu
        if not self.barrier_open and self._control.load(CTL_BARRIER):
            self.barrier_open = True
            cpu.acc.set(VC_BARRIER_VCLOCK_NS, cpu.clock.vclock_ns)
            cpu.acc.set(VC_BARRIER_WALL_NS, cpu.now_ns)
            cpu.acc.event(Kind.BARRIER)
            cpu.queue.open_barrier()
        if not self._stop_seen and self._control.load(CTL_STOP):
            self._stop_seen = True
            self.note_end()
            cpu.acc.event(Kind.STOP)
            cpu.queue.open_barrier()

    def note_end(self) -> None:
        """The measured time of this CPU is over: it saw the stop flag, or has nothing left to run."""
        cpu = self._cpu
        if not self._end_seen:
            self._end_seen = True
            cpu.acc.set(VC_END_VCLOCK_NS, cpu.clock.vclock_ns)
            cpu.acc.set(VC_END_WALL_NS, cpu.now_ns)

    # ---- at the barrier -----------------------------------------------------------------------------------------------------
    def arrive(self) -> Path:
        """The current task has come to the barrier, and waits there."""
        cpu = self._cpu
        cpu.tasks.move(cpu.queue.current, "arrive")
        cpu.switching.leave()
        cpu.kernel.add(K_AT_BARRIER, 1)
        yield from self._report()

    def finished(self) -> Path:
        """One more task is finished (K_DONE is counted up); before the barrier opens nobody waits for it there."""
        if not self.barrier_open:
            yield from self._report()

    def _report(self) -> Path:
        """Tell the host how many tasks have come as far as they will before the barrier opens: waiting there, or finished."""
        cpu = self._cpu
        arrived = cpu.kernel.load(K_AT_BARRIER) + cpu.kernel.load(K_DONE)
        yield from cpu.exits.take_undisturbed(ExitReason.HYPERCALL, arg0=HC_AT_BARRIER, arg1=arrived)
        # It may have opened between the task's look and its new state.
        if self.barrier_open or self._stop_seen:
            cpu.queue.open_barrier()
