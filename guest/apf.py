"""Async page faults as the guest kernel sees them: exception entry, ready interrupt, sleeping or halting until the page is there.

Not-present event (spec §2.2): #PF with CR2 = token; with interrupts off the kernel reads and clears the announcing word of this CPU's area,
then dispatches by it: 1 wait, 2 (mode E) wake or wake-all, 0 an ordinary fault. Ready event in mode I (spec §2.7): EOI, read the
token word, wake, clear the word, ACK, in this order.

Invariants
* Word and CR2 belong together: between exception and read nothing else runs on this CPU (interrupts are off, the area is reached through
  the direct map, so the read takes nested faults at most, and the host answers those synchronously while IF=0).
* A context that must not sleep never switches tasks: its CPU halts, with interrupts on, until the node is unlinked (spec §2.6, I41).

Not handled here: the sleeper table (guest/sleepers.py), what runs next (guest/switching.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from guest.events import GuestPanicError
from guest.sleepers import Woken
from proto.kvm import (
    AREA_BYTES,
    AREA_FLAGS,
    AREA_TOKEN,
    EN_AS_INT,
    EN_ENABLE,
    EN_SEND_ALWAYS,
    MSR_ASYNC_PF_ACK,
    MSR_ASYNC_PF_INT,
    REASON_NOT_PRESENT,
    REASON_READY,
    VECTOR_PAGE_READY,
    VECTOR_RESCHEDULE,
)
from proto.layout import (
    APF_AREA_GPA,
    T_CPL,
    T_CPU,
    T_FAULT_NS,
    T_IF,
    T_PREEMPT,
    T_TOKEN,
    T_WAKE_NS,
    VC_BROADCASTS,
    VC_HALT_TASKS,
    VC_NOT_PRESENT,
    VC_READY,
    VP_APF_ENABLED,
    VP_APF_GPA,
)
from proto.machine import Path
from proto.stats import VcpuHist
from proto.trace import Kind
from proto.units import TOKEN_WAKE_ALL

if TYPE_CHECKING:
    from guest.machine import GuestCpu

PF_VECTOR: Final = 14
TOKEN_VALID: Final = 1 << 32
"""T_TOKEN holds TOKEN_VALID | token while a task sleeps: in v3 and v7 a token may be 0."""
ACK: Final = 1


class AsyncPf:
    """Async-PF state of one CPU is in its page (VP_APF_*) and in the sleeper table; this object knows only whether a wait halts."""

    __slots__ = ("_area", "_cpu", "halting", "strays")

    def __init__(self, cpu: GuestCpu) -> None:
        self._cpu = cpu
        self._area = APF_AREA_GPA + AREA_BYTES * cpu.config.vcpu_id
        self.halting = False
        """The current context halts in wait(token)."""
        self.strays = 0
        """Async-PF words that did not go with their exception."""

    def forget(self) -> None:
        """The CPU was reset: no wait is under way any more."""
        self.halting = False

    def enable(self) -> Path:
        """Per-CPU set-up, interrupts off: the vector before the enable register, `enabled` last (spec §2.8)."""
        cpu, config = self._cpu, self._cpu.config
        cpu.page.store(VP_APF_GPA, self._area)
        yield from cpu.access.word32(self._area + AREA_FLAGS, write=True)
        yield from cpu.access.word32(self._area + AREA_TOKEN, write=True)
        value = self._area | EN_ENABLE
        if config.send_always:
            value |= EN_SEND_ALWAYS
        if config.profile.ready_by_interrupt:
            value |= EN_AS_INT
            yield from cpu.exits.wrmsr(MSR_ASYNC_PF_INT, VECTOR_PAGE_READY)
        yield from cpu.exits.wrmsr(config.profile.msr_en, value)
        cpu.page.store(VP_APF_ENABLED, 1)

    def disable(self) -> Path:
        """The register first, `enabled` last (spec §1.3). When this returns the host writes nothing here any more. No-op if not enabled."""
        cpu = self._cpu
        if cpu.page.load(VP_APF_ENABLED):
            yield from cpu.exits.wrmsr(cpu.config.profile.msr_en, 0)
            cpu.page.store(VP_APF_ENABLED, 0)

    # ---- entries ------------------------------------------------------------------------------------------------------------
    def page_fault(self, cr2: int) -> Path:
        """#PF injected by the host, in the context of the current task or of the idle loop."""
        cpu = self._cpu
        cpu.clock.spend(cpu.config.exception_cost_ns)
        token = cr2 & 0xFFFF_FFFF
        word = yield from self._read_and_clear(token)
        if word == REASON_NOT_PRESENT:
            cpu.acc.add(VC_NOT_PRESENT)
            self._record_not_present(cr2, token)
            yield from self._wait(token)
        elif word == REASON_READY and not cpu.config.profile.ready_by_interrupt:
            cpu.acc.event(Kind.G_IRQ, token, PF_VECTOR)
            yield from self._ready(token)
        else:
            # The word was taken by somebody else: an ordinary fault to the guest, which executes the instruction again.
            self.strays += 1

    def word_found(self) -> Path:
        """An ordinary #PF of the task found the word set although no event is due: clear it, then handle the fault as what it is.

        Dispatching on it would put the task to sleep on an address nobody will ever wake.
        """
        self.strays += 1
        yield from self._read_and_clear(0)

    def ready_interrupt(self) -> Path:
        """The page-ready vector; its EOI has been done."""
        cpu = self._cpu
        if not cpu.page.load(VP_APF_ENABLED):
            return
        token = yield from cpu.access.word32(self._area + AREA_TOKEN)
        yield from self._ready(token)
        # Logged before the host can see the cleared word.
        cpu.acc.event(Kind.G_CLEAR, token, AREA_TOKEN, token)
        yield from cpu.access.word32(self._area + AREA_TOKEN, write=True)
        yield from cpu.exits.wrmsr(MSR_ASYNC_PF_ACK, ACK)

    def _read_and_clear(self, token: int) -> Path:
        cpu = self._cpu
        if not cpu.page.load(VP_APF_ENABLED):
            return 0
        word = yield from cpu.access.word32(self._area + AREA_FLAGS)
        if word:
            cpu.acc.event(Kind.G_CLEAR, token, AREA_FLAGS, word)
            yield from cpu.access.word32(self._area + AREA_FLAGS, write=True)
        return word

    def _record_not_present(self, cr2: int, token: int) -> None:
        cpu = self._cpu
        task = cpu.queue.current
        cpl = 0
        if task >= 0:
            cpl = cpu.tasks.load(task, T_CPL)
            cpu.acc.latency(VcpuHist.NOT_PRESENT, cpu.now_ns - cpu.tasks.load(task, T_FAULT_NS))
        cpu.acc.event(Kind.G_NP, token, task + 1, cr2, cpl)

    # ---- waiting ------------------------------------------------------------------------------------------------------------
    def _may_sleep(self, task: int) -> bool:
        """Spec §2.6: v3 and v7 wherever the preempt count allows, later guests in user mode only; the idle loop never."""
        if task < 0 or self.halting:
            return False
        if self._cpu.config.profile.guest_sleeps_in_kernel:
            return self._cpu.tasks.load(task, T_PREEMPT) == 0
        if not self._cpu.tasks.load(task, T_IF):
            raise GuestPanicError("page not present announced to a context with interrupts off")
        return self._cpu.tasks.load(task, T_CPL) != 0

    def _wait(self, token: int) -> Path:
        cpu = self._cpu
        task = cpu.queue.current
        if self._may_sleep(task):
            yield from self._sleep(task, token)
            return
        cpu.acc.add(VC_HALT_TASKS)
        # A task's own node may be linked already when an event hits the halt loop itself.
        own = task >= 0 and not self.halting
        node = task if own else cpu.sleepers.allocate()
        if node < 0:
            raise GuestPanicError("no free node for a context that has to halt")
        if (yield from cpu.sleepers.wait(token, node, halted=True)):
            yield from self._halt_until_unlinked(node, task)
        if not own:
            cpu.sleepers.release(node)
        cpu.acc.event(Kind.G_RESUME, token, task + 1)

    def _sleep(self, task: int, token: int) -> Path:
        """The schedulable variant. The CPU picks another task when this returns with no current one."""
        cpu = self._cpu
        if not (yield from cpu.sleepers.wait(token, task, halted=False)):
            cpu.acc.event(Kind.G_RESUME, token, task + 1)
            return
        cpu.tasks.store(task, T_TOKEN, TOKEN_VALID | token)
        cpu.acc.event(Kind.G_SLEEP, token, task + 1, task)
        # A full barrier: the state must be visible before "linked" is read. A waker unlinks, then looks at the state; whichever
        # comes second sees the other (spec §2.3).
        cpu.tasks.try_move(task, "sleep")
        yield "sleep-state-set"
        if not cpu.sleepers.linked(task) and cpu.tasks.try_move(task, "stay"):
            cpu.tasks.store(task, T_TOKEN, 0)
            cpu.acc.event(Kind.G_RESUME, token, task + 1)
            return
        cpu.switching.leave()

    def go_on_halting(self, task: int) -> Path:
        """A fresh CPU in the halt loop of ``task``, which waits with its own node: the node says for which token."""
        cpu = self._cpu
        token = cpu.sleepers.token(task)
        self.halting = False
        yield from self._halt_until_unlinked(task, task)
        cpu.acc.event(Kind.G_RESUME, token, task + 1)

    def _halt_until_unlinked(self, node: int, task: int) -> Path:
        cpu = self._cpu
        outer, self.halting = self.halting, True
        if task >= 0 and not outer:
            cpu.tasks.move(task, "halt")
        while cpu.sleepers.linked(node):
            if cpu.interrupts.irr:
                yield from cpu.interrupts.take()
            else:
                # The halt loop of wait(token): STI; HLT; CLI. A save point where the task's records say all: its own node, no other wait
                # around this one.
                cpu.acc.interrupts = 1
                yield from cpu.execution.halt(restart=node == task and not outer)
                cpu.acc.interrupts = 0
        self.halting = outer
        if task >= 0 and not outer:
            cpu.tasks.move(task, "go_on")

    # ---- waking -------------------------------------------------------------------------------------------------------------
    def _ready(self, token: int) -> Path:
        cpu = self._cpu
        if token == TOKEN_WAKE_ALL:
            cpu.acc.add(VC_BROADCASTS)
            yield from self.wake_all()
            return
        cpu.acc.add(VC_READY)
        one = yield from cpu.sleepers.wake(token)
        if one is not None:
            if one.node < cpu.config.tasks:
                cpu.acc.latency(VcpuHist.READY, cpu.now_ns - cpu.tasks.load(one.node, T_FAULT_NS))
            yield from self._wake_up(one)

    def wake_all(self) -> Path:
        """Wake every sleeper of this CPU: the broadcast of the host, or the CPU goes offline."""
        woken = yield from self._cpu.sleepers.wake_all()
        for one in woken:
            yield from self._wake_up(one)

    def _wake_up(self, one: Woken) -> Path:
        """The second half of a wake: the node is unlinked, now its owner has to notice."""
        cpu = self._cpu
        here = one.cpu == cpu.config.vcpu_id
        if one.halted:
            if not here:
                yield from cpu.interrupts.send(one.cpu, VECTOR_RESCHEDULE)
            return
        task = one.node
        cpu.tasks.store(task, T_WAKE_NS, cpu.now_ns)
        if not cpu.tasks.try_move(task, "wake"):
            return
        home = cpu.tasks.load(task, T_CPU)
        if home == cpu.config.vcpu_id:
            cpu.queue.note_wake(task)
        else:
            yield from cpu.interrupts.send(home, VECTOR_RESCHEDULE)
