"""What each exit of a vCPU asks for, until its run loop goes on. Part of the vcpu machine.

An exit is handled by one path; what the guest sees of it goes with the next entry: an exception, or the result of a register read.

Not handled here: requests, halts and entries (host/vcpu.py), registers of async PF (host/x86.py), the pages themselves (host/vm.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from host.events import AtBarrier, Found, Gup, ReleasePages, ResetMachine, SendIpi
from host.x86 import REQ_APF_HALT, REQ_RESET, could_not_map
from proto.layout import XF_KERNEL, XF_WRITE
from proto.lives import HALT
from proto.machine import MachineError, Path
from proto.stats import HostCounter, HostHist
from proto.trace import Kind
from proto.wire import HC_AT_BARRIER, HC_OOM, HC_RELEASE, HC_RESET, Exit, ExitReason, Inject

if TYPE_CHECKING:
    from host.vcpu import VcpuMachine

_COUNTER_OF: Final = {
    Found.FAST: HostCounter.FAULTS_FAST,
    Found.ZERO_FILL: HostCounter.FAULTS_ZERO_FILL,
    Found.SWAP_CACHE: HostCounter.FAULTS_SWAP_CACHE,
    Found.SWAPPED_IN: HostCounter.FAULTS_SWAP_IN,
}


class Exits:
    """The exits of one vCPU."""

    __slots__ = ("_handlers", "_m")

    def __init__(self, machine: VcpuMachine) -> None:
        self._m = machine
        self._handlers: dict[int, Callable[[Exit], Path]] = {
            ExitReason.NESTED: self._nested_fault,
            ExitReason.WRMSR: self._wrmsr,
            ExitReason.RDMSR: self._rdmsr,
            ExitReason.HLT: self._hlt,
            ExitReason.IPI: self._ipi,
            ExitReason.HYPERCALL: self._hypercall,
            ExitReason.CR0: self._write_cr0,
            ExitReason.BOOT: _nothing,
            ExitReason.KICK: _nothing,
            ExitReason.RESUME: _nothing,
        }

    def path(self, record: Exit) -> Path:
        """The path of one exit. Raises MachineError for a reason that validation lets nobody send."""
        handler = self._handlers.get(record.reason)
        if handler is None:
            raise MachineError(f"vcpu {self._m.cpu}: exit reason {record.reason} passed validation")
        return handler(record)

    def _nested_fault(self, record: Exit) -> Path:
        """EPT violation: the ladder, then asynchronous if the rules allow, else wait (spec §3.1)."""
        m = self._m
        m.obs.count(HostCounter.NESTED_FAULTS)
        if record.flags & XF_KERNEL:
            m.obs.count(HostCounter.FAULTS_KERNEL_MODE)
        gfn = record.gpa >> 12
        write = bool(record.flags & XF_WRITE)
        how = Gup.NOWAIT if m.x86.host_async else Gup.WAIT
        answer = yield from m.get_page(gfn, write, how)
        if answer.value == Found.NEEDS_IO:
            yield "fault.needs_io"
            if (yield from self._go_async(record, gfn, answer.hvp)):
                return
            answer = yield from m.get_page(gfn, write, Gup.WAIT)
        if answer.value == Found.NO_MEMORY:
            return
        if answer.waited:
            m.obs.record(HostHist.FAULT, m.now_ns - m.exit_ns)
        if could_not_map(answer.value):
            m.obs.count(HostCounter.MACHINE_CHECKS)
            m.exception = (Inject.MACHINE_CHECK, record.gva)
            return
        if answer.value == Found.SWAPPED_IN:
            m.obs.count(HostCounter.FAULTS_SYNC)
        m.obs.count(_COUNTER_OF[Found(answer.value)])

    def _go_async(self, record: Exit, gfn: int, hvp: int) -> Path:
        """Steps 2 of spec §3.1; returns True when the fault needs no more of this exit."""
        m = self._m
        x86 = m.x86
        if not x86.can_do():
            return False
        m.trace(Kind.TRY_ASYNC_GET_PAGE, a=record.gpa, b=gfn)
        if x86.profile.gfn_hash and gfn in x86.hash:
            m.trace(Kind.ASYNC_PF_REPEATED_FAULT, a=record.gpa, b=gfn)
            m.obs.count(HostCounter.FAULTS_REPEATED)
            m.request(REQ_APF_HALT)
            return True
        yield "fault.setup"
        return (yield from x86.setup(record, hvp))

    def _wrmsr(self, record: Exit) -> Path:
        m = self._m
        if (yield from m.x86.write_msr(record.arg0, record.arg1)):
            m.exception = (Inject.GP, 0)

    def _rdmsr(self, record: Exit) -> Path:
        m = self._m
        value = m.x86.read_msr(record.arg0)
        if value < 0:
            m.exception = (Inject.GP, 0)
        else:
            m.result = value
        yield "rdmsr"

    def _hlt(self, record: Exit) -> Path:  # noqa: ARG002 - all exit handlers take the record
        m = self._m
        m.halt = HALT.go(m.halt, "hlt")
        yield "hlt"

    def _ipi(self, record: Exit) -> Path:
        m = self._m
        m.emit(SendIpi(m.vm, record.arg0, record.arg1))
        yield "ipi"

    def _hypercall(self, record: Exit) -> Path:
        m = self._m
        if record.arg0 == HC_AT_BARRIER:
            m.emit(AtBarrier(m.vm, record.arg1))
        elif record.arg0 == HC_RESET:
            m.emit(ResetMachine(m.vm, m.cpu))
            m.requests |= REQ_RESET
        elif record.arg0 == HC_RELEASE:
            gfn, mask = record.gpa >> 12, record.arg1
            yield from m.query(lambda ask: ReleasePages(m.cpu, ask, m.vm, gfn, mask))
        elif record.arg0 == HC_OOM:
            m.notice.answer(record)
        yield "hypercall"

    def _write_cr0(self, record: Exit) -> Path:
        m = self._m
        now = record.arg0 & 1
        m.last_exit = record._replace(cr0_pg=now)
        m.trace(Kind.CR0_PG, a=now, b=record.cr0_pg)
        m.x86.paging_changed(record.cr0_pg, now)
        yield "cr0"


def _nothing(_: Exit) -> Path:
    """Exits that only wanted the host to look around."""
    yield "nothing"
