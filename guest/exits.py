"""Leaving to the host and coming back: the exit record, what its entry brings, and the exits that kernel code makes on purpose.

Invariants
* Every exit record tells the complete state that the host decides on (proto/wire.py Exit).
* The host's notice that memory is short may come at any entry; it is handled there and then (guest/oom.py), and the exit goes on as if
  nothing had come.
* An exit with XF_RESTART is a save point: no kernel code is under way on this CPU, so that its registers (guest/registers.py) and shared
  memory are all of it.
* A reset ends whatever path took the exit: `CpuReset`, with the time in the host accounted for.

Not handled here: taking the exception that an entry brings (guest/execution.py), pending interrupts (guest/interrupts.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from guest.events import GuestPanicError, TakeExit
from proto.layout import VC_EXITS, VP_CR0_PG, VP_CR3, VP_X_FLAGS, VP_X_GPA, VP_X_GVA, XF_RESTART
from proto.machine import Path
from proto.wire import Entry, Exit, ExitReason, Held, Inject

if TYPE_CHECKING:
    from guest.machine import GuestCpu

_CHARGED: Final = frozenset((ExitReason.NESTED, ExitReason.WRMSR, ExitReason.HYPERCALL, ExitReason.IPI))
"""Exits that the guest's own code causes; kicks are the host's doing, and a halted CPU has nobody to charge."""
Fault = tuple[int, int, int]
"""Guest physical address, guest virtual address, XF_* flags."""


class CpuReset(Exception):  # noqa: N818 - not an error
    """The host reset this CPU: whatever it was doing is over, it starts from the beginning."""


class Exits:
    """The exits of one CPU; they are numbered, through resets too."""

    __slots__ = ("_cpu", "seq")

    def __init__(self, cpu: GuestCpu) -> None:
        self._cpu = cpu
        self.seq = 0
        """Number of the last exit record."""

    def take(
        self,
        reason: ExitReason,
        *,
        if_: int = 0,
        cpl: int = 0,
        arg0: int = 0,
        arg1: int = 0,
        fault: Fault | None = None,
        restart: bool = False,
    ) -> Path:
        """Leave to the host, come back with its `Entry`: time held is charged, pending interrupts are replaced.

        ``restart``: whoever goes on from this CPU's records alone does the same as this path would.
        """
        cpu = self._cpu
        if reason in _CHARGED:
            cpu.clock.spend(cpu.config.exit_cost_ns)
        cpu.acc.add(VC_EXITS)
        ask = cpu.new_ask()
        record = self.record(reason, if_=if_, cpl=cpl, arg0=arg0, arg1=arg1, fault=fault, restart=restart)
        cpu.emit(TakeExit(ask.ask_id, record))
        entered = yield ask
        entry: Entry = entered.entry
        self._came_back(entry, entered.at_ns)
        if entry.inject == Inject.RESET:
            raise CpuReset
        cpu.interrupts.arrived(entry, entered.at_ns)
        if entry.inject == Inject.OUT_OF_MEMORY:
            yield from cpu.oom.notice(entry.cr2)
            return entry._replace(inject=Inject.NONE)
        return entry

    def record(
        self,
        reason: ExitReason,
        *,
        if_: int = 0,
        cpl: int = 0,
        arg0: int = 0,
        arg1: int = 0,
        fault: Fault | None = None,
        restart: bool = False,
    ) -> Exit:
        """The next exit record. It tells the interrupts taken since the one before."""
        cpu = self._cpu
        gpa, gva, flags = fault or (0, 0, 0)
        if restart:
            flags |= XF_RESTART
        self.seq = (self.seq + 1) & 0xFFFF_FFFF
        cpu.acc.trace.lamport += 1
        # With interrupts off the host never halts this CPU, so nobody asks for the timer.
        timer_ns = cpu.queue.ns_to_preemption(cpu.clock.vclock_ns) if if_ and not cpu.apf.halting else 0
        accepted, eois = cpu.interrupts.told()
        return Exit(
            seq=self.seq,
            lamport=cpu.acc.trace.lamport,
            reason=reason,
            flags=flags,
            cpl=cpl,
            if_=if_,
            shadow=0,
            pending=0,
            cr0_pg=cpu.page.load(VP_CR0_PG),
            gpa=gpa,
            gva=gva,
            cr3=cpu.page.load(VP_CR3),
            timer_ns=timer_ns,
            accepted=accepted,
            eois=eois,
            arg0=arg0,
            arg1=arg1,
            cause=cpu.acc.cause,
        )

    def fault(self) -> Fault:
        """Where guest mode was left for a nested fault."""
        load = self._cpu.page.load
        return load(VP_X_GPA), load(VP_X_GVA), load(VP_X_FLAGS)

    def _came_back(self, entry: Entry, at_ns: int) -> None:
        """Account for the time in the host."""
        acc, clock = self._cpu.acc, self._cpu.clock
        acc.trace.observe(entry.lamport)
        acc.cause = entry.cause
        if entry.held_ns:
            clock.held(entry.held_kind, entry.held_ns)
        if entry.held_kind == Held.IDLE and at_ns > clock.vclock_ns:
            # An idle CPU has nothing to catch up: what it was behind is idle time, too.
            clock.held(Held.IDLE, at_ns - clock.vclock_ns)

    # ---- exits of kernel code -----------------------------------------------------------------------------------------------
    def take_undisturbed(
        self, reason: ExitReason, *, arg0: int = 0, arg1: int = 0, fault: Fault | None = None
    ) -> Path:
        """An exit of kernel code with interrupts off: nothing async can come, and a lost page of its own is the end. Raises
        GuestPanicError.
        """
        entry = yield from self.take(reason, arg0=arg0, arg1=arg1, fault=fault)
        _must_not_inject(entry)

    def wrmsr(self, index: int, value: int) -> Path:
        """WRMSR. #GP means that guest and host disagree on what they are: the kernel stops."""
        entry = yield from self.take(ExitReason.WRMSR, arg0=index, arg1=value)
        if entry.inject == Inject.GP:
            raise GuestPanicError(f"WRMSR {index:#x} := {value:#x} was refused with #GP")
        _must_not_inject(entry)


def _must_not_inject(entry: Entry) -> None:
    if entry.inject != Inject.NONE:
        raise GuestPanicError(f"exception {Inject(entry.inject).name} in kernel code with interrupts off")
