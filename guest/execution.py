"""What a CPU executes between two looks of its main loop: a stay of the current task in guest mode or a halt, and what follows from it.

A stay ends for the scheduler, with an exit (nested fault, kick), at the start barrier, or with the task. Ticks are taken where they have
an effect: the request to run a task says after how much guest time the tick comes that would preempt it.

Invariants
* Exits from a task and halts are save points (XF_RESTART), except a halt that kernel code waits in.
* An exception that an entry brings is taken at once, before anything else runs.
* A task that was chosen to die (guest/oom.py) executes nothing more from the moment its CPU has looked.

Not handled here: guest mode itself (guest/run.py), who runs next (guest/switching.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from guest.events import GuestPanicError, RunTask
from guest.exits import Fault
from proto.layout import (
    K_DONE,
    KILL_MACHINE_CHECK,
    KILL_OOM,
    KILL_SEGV,
    KILL_SWAP_FULL,
    RUN_ABORT,
    RUN_APF_WORD,
    RUN_BARRIER,
    RUN_BUDGET,
    RUN_DONE,
    RUN_IRQ_WINDOW,
    RUN_KICK,
    RUN_NESTED,
    RUN_OOM,
    RUN_RESCHED,
    RUN_SEGV,
    T_CPL,
    T_FAULT_NS,
    T_IF,
    T_KILL_REASON,
    T_OPS,
    VC_KERNEL_NESTED,
    VC_KICKS,
    VC_NESTED,
    VC_TASKS_DONE,
    VC_TASKS_KILLED,
    VP_IRQ_PENDING,
    VP_X_GVA,
    XF_KERNEL,
)
from proto.machine import MachineError, Path
from proto.trace import Kind
from proto.wire import Entry, ExitReason, Inject

if TYPE_CHECKING:
    from guest.machine import GuestCpu

OPS_TO_PREEMPTIBLE: Final = 8
"""A task that shall be preempted but may not be yet runs in steps of this many operations: about one pass of a critical section."""
_KILLS: Final = {RUN_SEGV: KILL_SEGV, RUN_OOM: KILL_OOM}
_GOES_ON: Final = frozenset((RUN_BUDGET, RUN_RESCHED, RUN_IRQ_WINDOW))


class Execution:
    """See the module docstring. No state: that is in the records of the tasks and in the other parts of the CPU."""

    __slots__ = ("_cpu",)

    def __init__(self, cpu: GuestCpu) -> None:
        self._cpu = cpu

    # ---- the current task ---------------------------------------------------------------------------------------------------
    def run_current(self) -> Path:
        """One stay in guest mode and what follows from it; False when the run is being torn down."""
        cpu = self._cpu
        task = cpu.queue.current
        if cpu.oom.dying(task):
            yield from self._kill(task, KILL_SWAP_FULL)
            return True
        ask = cpu.new_ask()
        cpu.emit(self._request(ask.ask_id, task))
        ran = yield ask
        cpu.clock.spend(ran.ns)
        code = ran.code
        if code in _GOES_ON:
            return True
        if code == RUN_NESTED:
            yield from self._nested_fault(task)
        elif code == RUN_KICK:
            cpu.acc.add(VC_KICKS)
            entry = yield from self.exit_from_task(ExitReason.KICK, task)
            yield from self.deliver(entry)
        elif code == RUN_DONE:
            yield from self._finish(task)
        elif code == RUN_BARRIER:
            yield from cpu.phases.arrive()
        elif code in _KILLS:
            yield from self._kill(task, _KILLS[code])
        elif code == RUN_APF_WORD:
            yield from cpu.apf.word_found()
        elif code == RUN_ABORT:
            return False
        else:
            raise MachineError(f"vcpu_run of task {task} returned {code}")
        return True

    def _request(self, ask_id: int, task: int) -> RunTask:
        """For how long ``task`` may stay; its page says whether it has to leave when it turns interrupts on."""
        cpu, queue, vclock_ns = self._cpu, self._cpu.queue, self._cpu.clock.vclock_ns
        off = not cpu.tasks.load(task, T_IF)
        gated = cpu.interrupts.gated()
        waiting_irq = off and ((cpu.interrupts.irr != 0 and not gated) or vclock_ns >= queue.next_tick_ns)
        if cpu.page.load(VP_IRQ_PENDING) != waiting_irq:
            cpu.page.store(VP_IRQ_PENDING, waiting_irq)
        max_ns = queue.ns_to_preemption(vclock_ns)
        if gated:
            gate_ns = cpu.interrupts.gate_ns
            max_ns = min(max_ns or gate_ns, gate_ns - vclock_ns)
        return RunTask(ask_id, task, max_ns, OPS_TO_PREEMPTIBLE if queue.need_resched else 0)

    def _nested_fault(self, task: int) -> Path:
        cpu = self._cpu
        fault = cpu.exits.fault()
        cpu.acc.add(VC_NESTED)
        if fault[2] & XF_KERNEL:
            cpu.acc.add(VC_KERNEL_NESTED)
        cpu.tasks.store(task, T_FAULT_NS, cpu.now_ns)
        entry = yield from self.exit_from_task(ExitReason.NESTED, task, fault)
        yield from self.deliver(entry)

    def exit_from_task(self, reason: ExitReason, task: int, fault: Fault | None = None) -> Path:
        """Leave to the host in the context of ``task``; returns the entry."""
        cpu = self._cpu
        if_, cpl = cpu.tasks.load(task, T_IF), cpu.tasks.load(task, T_CPL)
        return (yield from cpu.exits.take(reason, if_=if_, cpl=cpl, fault=fault, restart=True))

    # ---- nobody -------------------------------------------------------------------------------------------------------------
    def halt(self, *, restart: bool = True) -> Path:
        """HLT with interrupts on: the idle loop and the halt loop of wait(token). ``restart``: a save point."""
        cpu = self._cpu
        if cpu.queue.current < 0:
            cpu.switching.idle()
        cpu.acc.event(Kind.G_HLT)
        entry = yield from cpu.exits.take(ExitReason.HLT, if_=1, restart=restart)
        yield from self.deliver(entry)

    # ---- exceptions ---------------------------------------------------------------------------------------------------------
    def deliver(self, entry: Entry) -> Path:
        """Take the exception that came with an entry into a task, the idle loop or the halt loop."""
        cpu = self._cpu
        if entry.inject == Inject.NONE:
            return
        if entry.inject in (Inject.PF_NOT_PRESENT, Inject.PF_READY):
            before, cpu.acc.interrupts = cpu.acc.interrupts, 0
            yield from cpu.apf.page_fault(entry.cr2)
            cpu.acc.interrupts = before
        elif entry.inject == Inject.MACHINE_CHECK and cpu.queue.current >= 0 and not cpu.apf.halting:
            task = cpu.queue.current
            cpu.acc.event(Kind.G_MACHINE_CHECK, 0, task + 1, entry.cr2)
            yield from self._kill(task, KILL_MACHINE_CHECK)
        else:
            raise GuestPanicError(f"exception {Inject(entry.inject).name} where no task can take it")

    # ---- the end of a task --------------------------------------------------------------------------------------------------
    def _finish(self, task: int) -> Path:
        cpu = self._cpu
        cpu.acc.add(VC_TASKS_DONE)
        cpu.acc.event(Kind.TASK_DONE, 0, task + 1, cpu.tasks.load(task, T_OPS))
        yield from self._retire(task, "finish")

    def _kill(self, task: int, reason: int) -> Path:
        cpu = self._cpu
        cpu.tasks.release_locks(task)
        cpu.acc.add(VC_TASKS_KILLED)
        cpu.tasks.store(task, T_KILL_REASON, reason)
        cpu.acc.event(Kind.TASK_KILLED, 0, task + 1, reason, cpu.page.load(VP_X_GVA))
        yield from self._retire(task, "kill")

    def _retire(self, task: int, how: str) -> Path:
        cpu = self._cpu
        cpu.tasks.move(task, how)
        cpu.switching.leave()
        if cpu.kernel.add(K_DONE, 1) + 1 == cpu.config.tasks and cpu.config.hotplug:
            yield from cpu.hotplug.power_off()
        if cpu.oom.dying(task):
            # Perhaps the last that its address space waited for.
            yield from cpu.oom.give_back()
        yield from cpu.phases.finished()
