"""The guest kernel of one CPU as a pure machine: what this CPU does next.

A CPU is sequential, so the machine is one path with one open request at a time (guest/events.py): run a task in guest mode, leave to the
host, access guest memory, let others run. Its world performs the request and feeds the answer back. Real processes and a simulated
world drive the same machine.

Time: ``vclock_ns`` is this CPU's guest time: operations executed, costs, and time held in the host, which the guest cannot tell from
running. The current task is charged for all of it. Timer ticks are taken where they have an effect: the request to run a task says
after how much guest time the tick comes that would preempt it.

Invariants
* Kernel code runs with interrupts off; they are on in tasks that have IF=1, in the idle loop and in the halt loop, and only there
  pending interrupts are taken and tasks switched.
* A task leaves TS_RUNNING before another one gets it.
* Every exit record tells the complete state that the host decides on (proto/wire.py Exit).
* The host's notice that memory is short may come at any entry; it is handled there and then (guest/oom.py), and the exit goes on as if
  nothing had come.
* An exit with XF_RESTART is a save point: no kernel code is under way on this CPU, so that `registers` and shared memory are all of it.

Not handled here: CPUs that go and come, and reboots (guest/hotplug.py); guest memory other than the async-PF area and fresh tables.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from guest.accounting import Accounting
from guest.apf import TOKEN_VALID, AsyncPf
from guest.events import (
    Access32,
    ClearPage,
    CpuConfig,
    GuestPanicError,
    PowerDown,
    PowerOn,
    Relax,
    RunTask,
    TakeExit,
)
from guest.hotplug import Hotplug
from guest.oom import OutOfMemory
from guest.registers import Registers
from guest.sched import NOBODY, RunQueue
from guest.sleepers import Sleepers
from guest.syscalls import release_locks
from proto.kvm import (
    MSR_X2APIC_SPIV,
    SPIV_ENABLE,
    VECTOR_CALL,
    VECTOR_PAGE_READY,
    VECTOR_RESCHEDULE,
    VECTOR_TIMER,
)
from proto.layout import (
    CTL_BARRIER,
    CTL_STOP,
    K_AT_BARRIER,
    K_DONE,
    K_MEMORY_PAGES,
    K_ONLINE,
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
    T_CR3,
    T_FAULT_NS,
    T_IF,
    T_KILL_REASON,
    T_LAMPORT,
    T_OPS,
    T_PREEMPT,
    T_STATE,
    T_TOKEN,
    TASK_WORDS,
    VC_BARRIER_VCLOCK_NS,
    VC_BARRIER_WALL_NS,
    VC_BLOCKED_NS,
    VC_END_VCLOCK_NS,
    VC_END_WALL_NS,
    VC_EXITS,
    VC_HALTED_NS,
    VC_IDLE_NS,
    VC_IPIS,
    VC_KERNEL_NESTED,
    VC_KICKS,
    VC_NESTED,
    VC_RUNNING_NS,
    VC_SWITCHES,
    VC_TASKS_DONE,
    VC_TASKS_KILLED,
    VC_VCLOCK_NS,
    VP_APF_ENABLED,
    VP_CR0_PG,
    VP_CR3,
    VP_IRQ_PENDING,
    VP_NEED_RESCHED,
    VP_TASK,
    VP_X_FLAGS,
    VP_X_GPA,
    VP_X_GVA,
    XF_KERNEL,
    XF_RESTART,
    owners_base,
    task_base,
)
from proto.lives import TASK
from proto.machine import Ask, Machine, MachineError, Path
from proto.port import ArrayPort, MemoryPort
from proto.trace import Kind
from proto.wire import HC_AT_BARRIER, Entry, Exit, ExitReason, Held, Inject, unpack_vectors

IRQ_VECTOR: Final = 0xFF
SPURIOUS: Final = 0xFF
"""Low byte of SPIV."""
OPS_TO_PREEMPTIBLE: Final = 8
"""A task that shall be preempted but may not be yet runs in steps of this many operations: about one pass of a critical section."""
_HELD_COUNTER: Final[dict[int, int]] = {
    Held.BLOCKED: VC_BLOCKED_NS,
    Held.HALTED: VC_HALTED_NS,
    Held.IDLE: VC_IDLE_NS,
}
_CHARGED_EXITS: Final = frozenset((ExitReason.NESTED, ExitReason.WRMSR, ExitReason.HYPERCALL, ExitReason.IPI))
"""Exits that the guest's own code causes; kicks are the host's doing, and a halted CPU has nobody to charge."""
_KILLS: Final = {RUN_SEGV: KILL_SEGV, RUN_OOM: KILL_OOM}
_REGISTERS: Final = (VP_TASK, VP_CR0_PG, VP_CR3, VP_APF_ENABLED, VP_IRQ_PENDING, VP_NEED_RESCHED)
"""Words of the vCPU page that a reset clears."""
_GOES_ON: Final = frozenset((RUN_BUDGET, RUN_RESCHED, RUN_IRQ_WINDOW))


class CpuReset(Exception):  # noqa: N818 - not an error
    """The host reset this CPU: whatever it was doing is over, it starts from the beginning."""


class GuestCpu(Machine):
    """One vCPU's kernel.

    ``kernel``: the guest kernel segment, ``vcpu_page``: this CPU's page, ``control``: page 0 of the control segment (read only),
    ``vmc``: the page of this VM in it (read only; without one nobody ever asks this guest for a reboot or a CPU). Events: `PowerOn`
    once, then answers. Effects: exactly one request, the last one `PowerDown`. ``resume``: go on from a save point.
    """

    __slots__ = (
        "_base",
        "_control",
        "_end_seen",
        "_kern",
        "_last",
        "_resume",
        "_stop_seen",
        "acc",
        "accepted",
        "apf",
        "barrier_open",
        "config",
        "eois",
        "gate_ns",
        "halting",
        "hotplug",
        "irr",
        "kernel",
        "oom",
        "owners",
        "owners_at",
        "page",
        "queue",
        "seq",
        "sleepers",
        "strays",
        "vclock_ns",
    )

    def __init__(
        self,
        config: CpuConfig,
        kernel: npt.NDArray[np.uint64],
        vcpu_page: npt.NDArray[np.uint64],
        control: npt.NDArray[np.uint64],
        acc: Accounting,
        resume: Registers | None = None,
        vmc: npt.NDArray[np.uint64] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.acc = acc
        self.kernel: MemoryPort = ArrayPort(kernel)
        self.page: MemoryPort = ArrayPort(vcpu_page)
        self._control: MemoryPort = ArrayPort(control)
        self._kern = kernel
        self._base = task_base(config.tasks, config.vcpus)
        self.owners_at = owners_base(config.tasks, config.vcpus)
        self.owners = kernel[self.owners_at : self.owners_at + int(kernel[K_MEMORY_PAGES])]
        """The owner of each guest page (K_OWNERS)."""
        self.queue = RunQueue(
            kernel, config.tasks, config.vcpus, config.vcpu_id, config.tick_ns, config.granularity_ns
        )
        self.sleepers = Sleepers(self.kernel, config.tasks, config.vcpus, config.vcpu_id, acc, self._relax)
        self.apf = AsyncPf(self)
        self.oom = OutOfMemory(self)
        self.hotplug = Hotplug(self, ArrayPort(vmc if vmc is not None else np.zeros(512, np.uint64)))
        self.vclock_ns = 0
        self.seq = 0
        self.gate_ns = 0
        """Guest time before which a pending interrupt is not taken."""
        self.irr = 0
        """Pending interrupt vectors, packed as in the entry record."""
        self.accepted = 0
        """Vectors taken since the last exit, packed."""
        self.eois = 0
        self.halting = False
        """The current context halts in wait(token)."""
        self.strays = 0
        """Async-PF words that did not go with their exception."""
        self.barrier_open = False
        self._stop_seen = False
        self._end_seen = False
        self._last = NOBODY
        self._resume = resume
        if resume is not None:
            self._set_registers(resume)

    def path_for(self, event: Any) -> Path | None:
        """`PowerOn` starts the CPU, everything else answers its open request."""
        if type(event) is PowerOn:
            return self._main()
        self.answer(event.ask, event)
        return None

    # ---- the CPU's life -----------------------------------------------------------------------------------------------------
    def _main(self) -> Path:
        first = True
        while True:
            try:
                yield from self._life(first=first)
            except CpuReset:
                first = False
                self._forget()
            else:
                return

    def _life(self, *, first: bool) -> Path:
        """From its start to the end of the machine; a reset ends it with `CpuReset`."""
        resume = self._resume if first else None
        if (resume is not None and resume.off) or (
            not first and not (yield from self.hotplug.started_again())
        ):
            self._power_down(abort=False)
            return
        if resume is not None:
            yield from self._go_on(resume.at_ns)
        else:
            yield from self._boot()
        if not first:
            yield from self.hotplug.booted_again()
        yield from self._run_until_off()

    def _run_until_off(self) -> Path:
        queue = self.queue
        while True:
            self._look_at_control()
            if self.irr and self._interrupts_on() and self._interrupts_due():
                yield from self.take_interrupts()
                # Handlers leave to the host; a poke that came meanwhile is used up, so look again before anything that may sleep.
                continue
            if self.config.hotplug and (yield from self.hotplug.look()):
                continue
            if self.vclock_ns >= queue.next_tick_ns and self._interrupts_on():
                queue.tick(self.vclock_ns)
            if queue.current < 0 or queue.need_resched:
                self._schedule()
            if queue.current >= 0:
                if not (yield from self._run_current()):
                    self._power_down(abort=True)
                    return
            elif queue.alive or not self.hotplug.may_power_down():
                yield from self.halt()
            else:
                self._power_down(abort=False)
                return

    def _boot(self) -> Path:
        """Interrupts are off until the main loop (T1: the enable register is written before this CPU's first interrupt)."""
        yield from self.exit(ExitReason.BOOT)
        self._must_not_inject((yield from self.exit(ExitReason.CR0, arg0=1)))
        self.page.store(VP_CR0_PG, 1)
        yield from self.wrmsr(MSR_X2APIC_SPIV, SPIV_ENABLE | SPURIOUS)
        if self.config.enables_async_pf:
            yield from self.apf.enable()
            # A kernel boots on with interrupts on for long before its first task runs: the broadcast of enabling comes here. Later it
            # would wake a task whose ready event is still to come, and that one would then leave a dummy for nobody.
            entry = yield from self.exit(ExitReason.HYPERCALL, if_=1)
            yield from self._deliver(entry)
        # Each CPU sets its own bit, when it is clear, so adding is setting.
        self.kernel.add(K_ONLINE + self.config.vcpu_id // 64, 1 << (self.config.vcpu_id % 64))
        self.acc.interrupts = 1

    def _forget(self) -> None:
        """What a reset leaves: the clock and the accounts, which are the emulator's."""
        for word in _REGISTERS:
            self.page.store(word, 0)
        self.queue.forget()
        self.oom.forget()
        self.irr = self.accepted = self.eois = self.gate_ns = 0
        self.halting = False
        self.acc.interrupts = 0
        self._last = NOBODY

    # ---- saved and restored -------------------------------------------------------------------------------------------------
    def registers(self, now_ns: int) -> Registers:
        """All that this CPU holds at a save point; ``now_ns`` monotonic."""
        queue = self.queue.registers()
        return Registers(
            off=0,
            vclock_ns=self.vclock_ns,
            seq=self.seq,
            halting=self.halting,
            strays=self.strays,
            barrier_open=self.barrier_open,
            stop_seen=self._stop_seen,
            end_seen=self._end_seen,
            last=self._last,
            lamport=self.acc.trace.lamport,
            at_ns=now_ns,
            **queue,
        )

    def _set_registers(self, resume: Registers) -> None:
        self.vclock_ns = resume.vclock_ns
        self.seq = resume.seq
        self.halting = bool(resume.halting)
        self.strays = resume.strays
        self.barrier_open = bool(resume.barrier_open)
        self._stop_seen = bool(resume.stop_seen)
        self._end_seen = bool(resume.end_seen)
        self._last = resume.last
        self.queue.set_registers(resume)
        self.acc.trace.observe(resume.lamport)

    def _go_on(self, saved_ns: int) -> Path:
        """A fresh CPU takes up what a saved one left: in a task, in the halt loop of one, or idle."""
        if opened_ns := self.acc.get(VC_BARRIER_WALL_NS):
            # As if the barrier had opened so much later: differences of wall time do not contain the time between.
            self.acc.set(VC_BARRIER_WALL_NS, max(1, opened_ns + self.now_ns - saved_ns))
        task = self.queue.current
        self.acc.interrupts = 1
        if task < 0 or self.halting:
            entry = yield from self.exit(ExitReason.RESUME, if_=1, restart=True)
        else:
            self.task_store(task, T_FAULT_NS, self.now_ns)
            entry = yield from self._exit_from_task(ExitReason.RESUME, task, None)
        # No other interrupt may wait for the guest clock: the broadcast has to come before any new fault.
        self.gate_ns = 0
        yield from self._deliver(entry)
        if self.halting:
            self.acc.interrupts = 0
            yield from self.apf.go_on_halting(task)
            self.acc.interrupts = 1

    def _power_down(self, *, abort: bool) -> None:
        self._note_end()
        self.emit(PowerDown(None if abort else self._record(ExitReason.DONE, 0, 0, 0, 0, None)))

    def _look_at_control(self) -> None:
        """Barrier and stop flag: noted when this CPU first sees them."""
        if not self.barrier_open and self._control.load(CTL_BARRIER):
            self.barrier_open = True
            self.acc.set(VC_BARRIER_VCLOCK_NS, self.vclock_ns)
            self.acc.set(VC_BARRIER_WALL_NS, self.now_ns)
            self.acc.event(Kind.BARRIER)
            self.queue.open_barrier()
        if not self._stop_seen and self._control.load(CTL_STOP):
            self._stop_seen = True
            self._note_end()
            self.acc.event(Kind.STOP)
            # A run that is stopped before its barrier opens holds nobody at it.
            self.queue.open_barrier()

    def _note_end(self) -> None:
        if not self._end_seen:
            self._end_seen = True
            self.acc.set(VC_END_VCLOCK_NS, self.vclock_ns)
            self.acc.set(VC_END_WALL_NS, self.now_ns)

    # ---- running a task -----------------------------------------------------------------------------------------------------
    def _run_current(self) -> Path:
        """One stay in guest mode and what follows from it; False when the run is being torn down."""
        queue = self.queue
        task = queue.current
        if self.oom.dying(task):
            yield from self._retire(task, "kill", KILL_SWAP_FULL)
            return True
        off = not self.task_load(task, T_IF)
        gated = self.irr != 0 and self.vclock_ns < self.gate_ns
        waiting_irq = off and ((self.irr != 0 and not gated) or self.vclock_ns >= queue.next_tick_ns)
        if self.page.load(VP_IRQ_PENDING) != waiting_irq:
            self.page.store(VP_IRQ_PENDING, waiting_irq)
        max_ns = queue.ns_to_preemption(self.vclock_ns)
        if gated:
            max_ns = min(max_ns or self.gate_ns, self.gate_ns - self.vclock_ns)
        ask = self.new_ask()
        self.emit(RunTask(ask.ask_id, task, max_ns, OPS_TO_PREEMPTIBLE if queue.need_resched else 0))
        ran = yield ask
        self.spend(ran.ns)
        code = ran.code
        if code in _GOES_ON:
            return True
        if code == RUN_NESTED:
            yield from self._nested_fault(task)
        elif code == RUN_KICK:
            self.acc.add(VC_KICKS)
            entry = yield from self._exit_from_task(ExitReason.KICK, task, None)
            yield from self._deliver(entry)
        elif code == RUN_DONE:
            yield from self._retire(task, "finish", 0)
        elif code == RUN_BARRIER:
            yield from self._stop_at_barrier(task)
        elif code in _KILLS:
            yield from self._retire(task, "kill", _KILLS[code])
        elif code == RUN_APF_WORD:
            yield from self.apf.word_found()
        elif code == RUN_ABORT:
            return False
        else:
            raise MachineError(f"vcpu_run of task {task} returned {code}")
        return True

    def _nested_fault(self, task: int) -> Path:
        fault = self._fault()
        self.acc.add(VC_NESTED)
        if fault[2] & XF_KERNEL:
            self.acc.add(VC_KERNEL_NESTED)
        self.task_store(task, T_FAULT_NS, self.now_ns)
        entry = yield from self._exit_from_task(ExitReason.NESTED, task, fault)
        yield from self._deliver(entry)

    def _stop_at_barrier(self, task: int) -> Path:
        self.task_move(task, "arrive")
        self.leave_task()
        self.kernel.add(K_AT_BARRIER, 1)
        yield from self._report_barrier()
        # It may have opened between the task's look and its new state.
        self._reopen_barrier()

    def _retire(self, task: int, how: str, reason: int) -> Path:
        if how == "finish":
            self.acc.add(VC_TASKS_DONE)
            self.acc.event(Kind.TASK_DONE, 0, task + 1, self.task_load(task, T_OPS))
        else:
            at = self._base + task * TASK_WORDS
            release_locks(self._kern, self._kern[at : at + TASK_WORDS])
            self.acc.add(VC_TASKS_KILLED)
            self.task_store(task, T_KILL_REASON, reason)
            self.acc.event(Kind.TASK_KILLED, 0, task + 1, reason, self.page.load(VP_X_GVA))
        self.task_move(task, how)
        self.leave_task()
        if self.kernel.add(K_DONE, 1) + 1 == self.config.tasks and self.config.hotplug:
            yield from self.hotplug.power_off()
        if self.oom.dying(task):
            # Perhaps the last that its address space waited for.
            yield from self.oom.give_back()
        if not self.barrier_open:
            yield from self._report_barrier()
            self._reopen_barrier()

    def _report_barrier(self) -> Path:
        """Tell the host how many tasks have come as far as they will before the barrier opens: waiting there, or finished.

        The counters only grow until then, so whoever changes one last reports the final sum.
        """
        arrived = self.kernel.load(K_AT_BARRIER) + self.kernel.load(K_DONE)
        entry = yield from self.exit(ExitReason.HYPERCALL, arg0=HC_AT_BARRIER, arg1=arrived)
        self._must_not_inject(entry)

    def _reopen_barrier(self) -> None:
        if self.barrier_open or self._stop_seen:
            self.queue.open_barrier()

    # ---- scheduling ---------------------------------------------------------------------------------------------------------
    def _schedule(self) -> None:
        """Pick the task with the least virtual runtime; the current one stays if it may not be preempted."""
        queue = self.queue
        task = queue.current
        if task >= 0:
            if not self._may_preempt(task):
                self.page.store(VP_NEED_RESCHED, 1)
                return
            self.task_move(task, "preempt")
        chosen = queue.pick()
        self.page.store(VP_NEED_RESCHED, 0)
        if chosen < 0:
            self.page.store(VP_TASK, 0)
            return
        self.task_move(chosen, "pick")
        if lamport := self.task_load(chosen, T_LAMPORT):
            self.acc.trace.observe(lamport)
            self.task_store(chosen, T_LAMPORT, 0)
        if chosen != self._last:
            self.acc.add(VC_SWITCHES)
            self.acc.event(Kind.SWITCH, 0, self._last + 1, chosen + 1, self.acc.interrupts)
            self._last = chosen
            self.spend(self.config.switch_cost_ns)
        self.page.store(VP_TASK, chosen + 1)
        self.page.store(VP_CR3, self.task_load(chosen, T_CR3))
        token = self.task_load(chosen, T_TOKEN)
        if token:
            if self.sleepers.linked(chosen):
                raise MachineError(f"task {chosen} runs while its node is in the sleeper table")
            self.task_store(chosen, T_TOKEN, 0)
            self.acc.event(Kind.G_RESUME, token & ~TOKEN_VALID, chosen + 1)

    def _may_preempt(self, task: int) -> bool:
        """A tick or wake-up may switch away from ``task`` at this point of its program."""
        return (
            self.task_load(task, T_PREEMPT) == 0
            and self.task_load(task, T_IF) != 0
            and (self.config.preemptible or self.task_load(task, T_CPL) != 0)
        )

    def put_task_back(self) -> bool:
        """Take the current task off this CPU, into its queue; False while it may not be preempted (it soon may)."""
        task = self.queue.current
        if task < 0:
            return True
        if not self._may_preempt(task):
            self.queue.need_resched = True
            return False
        self.task_move(task, "preempt")
        self.leave_task()
        return True

    def leave_task(self) -> None:
        """The current task stopped running (its state says why); the CPU picks another one next."""
        self.queue.current = NOBODY

    # ---- interrupts ---------------------------------------------------------------------------------------------------------
    def _interrupts_on(self) -> bool:
        task = self.queue.current
        return task < 0 or self.task_load(task, T_IF) != 0

    def _interrupts_due(self) -> bool:
        """A paced CPU that is behind the wall clock takes an interrupt when its own clock has come to the moment it arrived.

        Otherwise a CPU that spends its wall time on exits would see the next page arrive before it executed anything, and its other
        tasks would starve for a cost that only the emulator has. An idle CPU skips the time in between.
        """
        if self.vclock_ns < self.gate_ns and self.queue.current < 0 and not self.queue.need_resched:
            if self.queue.scan() >= 0:
                return False
            self._held(Held.IDLE, self.gate_ns - self.vclock_ns)
        return self.vclock_ns >= self.gate_ns

    def take_interrupts(self) -> Path:
        """Take what is pending, highest priority first. Interrupts are on when this is called, off in the handlers."""
        before, self.acc.interrupts = self.acc.interrupts, 0
        while self.irr:
            vector = self.irr & IRQ_VECTOR
            self.irr >>= 8
            # APICv: neither taking an interrupt nor its EOI is an exit; the next exit record tells both.
            self.accepted = self.accepted << 8 | vector
            self.eois += 1
            self.spend(self.config.interrupt_cost_ns)
            self.acc.event(Kind.G_IRQ, 0, vector)
            if vector == VECTOR_PAGE_READY:
                yield from self.apf.ready_interrupt()
            elif vector == VECTOR_TIMER:
                self.queue.tick(self.vclock_ns)
            elif vector == VECTOR_RESCHEDULE:
                self.queue.note_wake()
            elif vector == VECTOR_CALL:
                yield from self.hotplug.called()
        self.acc.interrupts = before

    def halt(self, *, restart: bool = True) -> Path:
        """HLT with interrupts on: the idle loop and the halt loop of wait(token). ``restart``: a save point."""
        if self.queue.current < 0:
            # Whatever runs next is a switch from idle.
            self._last = NOBODY
        self.acc.event(Kind.G_HLT)
        entry = yield from self.exit(ExitReason.HLT, if_=1, restart=restart)
        yield from self._deliver(entry)

    # ---- exits --------------------------------------------------------------------------------------------------------------
    def exit(
        self,
        reason: ExitReason,
        *,
        if_: int = 0,
        cpl: int = 0,
        arg0: int = 0,
        arg1: int = 0,
        fault: tuple[int, int, int] | None = None,
        restart: bool = False,
    ) -> Path:
        """Leave to the host, come back with its `Entry`: time held is charged, pending interrupts are replaced.

        ``restart``: whoever goes on from this CPU's records alone does the same as this path would.
        """
        if reason in _CHARGED_EXITS:
            self.spend(self.config.exit_cost_ns)
        self.acc.add(VC_EXITS)
        ask = self.new_ask()
        self.emit(TakeExit(ask.ask_id, self._record(reason, if_, cpl, arg0, arg1, fault, restart=restart)))
        entered = yield ask
        entry: Entry = entered.entry
        if entry.inject == Inject.RESET:
            self._came_back(entry, entered.at_ns)
            raise CpuReset
        self._came_back(entry, entered.at_ns)
        if entry.irr and not self.irr:
            self.gate_ns = 0 if entry.held_kind == Held.HALTED else entered.at_ns
        elif entry.held_kind == Held.HALTED and self.vclock_ns < self.gate_ns:
            # The interrupt that waits for this CPU's clock has ended the halt: until then the CPU was halted (I49).
            self._held(Held.HALTED, self.gate_ns - self.vclock_ns)
        if VECTOR_CALL in unpack_vectors(entry.irr):
            # Another CPU waits for this one: it is not the emulator's lag that may decide when it is taken.
            self.gate_ns = 0
        self.irr = entry.irr
        if entry.inject == Inject.OUT_OF_MEMORY:
            yield from self.oom.notice(entry.cr2)
            return entry._replace(inject=Inject.NONE)
        return entry

    def _came_back(self, entry: Entry, at_ns: int) -> None:
        """Account for the time in the host."""
        self.acc.trace.observe(entry.lamport)
        self.acc.cause = entry.cause
        if entry.held_ns:
            self._held(entry.held_kind, entry.held_ns)
        if entry.held_kind == Held.IDLE and at_ns > self.vclock_ns:
            # An idle CPU has nothing to catch up: what it was behind is idle time, too.
            self._held(Held.IDLE, at_ns - self.vclock_ns)

    def _record(
        self,
        reason: ExitReason,
        if_: int,
        cpl: int,
        arg0: int,
        arg1: int,
        fault: tuple[int, int, int] | None,
        *,
        restart: bool = False,
    ) -> Exit:
        gpa, gva, flags = fault or (0, 0, 0)
        if restart:
            flags |= XF_RESTART
        page, queue, trace = self.page, self.queue, self.acc.trace
        self.seq = (self.seq + 1) & 0xFFFF_FFFF
        trace.lamport += 1
        # With interrupts off the host never halts this CPU, so nobody asks for the timer.
        timer_ns = queue.ns_to_preemption(self.vclock_ns) if if_ and not self.halting else 0
        record = Exit(
            seq=self.seq,
            lamport=trace.lamport,
            reason=reason,
            flags=flags,
            cpl=cpl,
            if_=if_,
            shadow=0,
            pending=0,
            cr0_pg=page.load(VP_CR0_PG),
            gpa=gpa,
            gva=gva,
            cr3=page.load(VP_CR3),
            timer_ns=timer_ns,
            accepted=self.accepted & 0xFFFF_FFFF,
            eois=self.eois,
            arg0=arg0,
            arg1=arg1,
            cause=self.acc.cause,
        )
        self.accepted = 0
        self.eois = 0
        return record

    def _exit_from_task(self, reason: ExitReason, task: int, fault: tuple[int, int, int] | None) -> Path:
        if_, cpl = self.task_load(task, T_IF), self.task_load(task, T_CPL)
        return (yield from self.exit(reason, if_=if_, cpl=cpl, fault=fault, restart=True))

    def _deliver(self, entry: Entry) -> Path:
        """Take the exception that came with an entry into a task, the idle loop or the halt loop."""
        if entry.inject == Inject.NONE:
            return
        if entry.inject in (Inject.PF_NOT_PRESENT, Inject.PF_READY):
            before, self.acc.interrupts = self.acc.interrupts, 0
            yield from self.apf.page_fault(entry.cr2)
            self.acc.interrupts = before
        elif entry.inject == Inject.MACHINE_CHECK and self.queue.current >= 0 and not self.halting:
            task = self.queue.current
            self.acc.event(Kind.G_MACHINE_CHECK, 0, task + 1, entry.cr2)
            yield from self._retire(task, "kill", KILL_MACHINE_CHECK)
        else:
            raise GuestPanicError(f"exception {Inject(entry.inject).name} where no task can take it")

    def _must_not_inject(self, entry: Entry) -> None:
        """Kernel code runs with interrupts off: nothing async, and a lost page of its own is the end."""
        if entry.inject != Inject.NONE:
            raise GuestPanicError(f"exception {Inject(entry.inject).name} in kernel code with interrupts off")

    def wrmsr(self, index: int, value: int) -> Path:
        """WRMSR. #GP means that guest and host disagree on what they are: the kernel stops."""
        entry = yield from self.exit(ExitReason.WRMSR, arg0=index, arg1=value)
        if entry.inject == Inject.GP:
            raise GuestPanicError(f"WRMSR {index:#x} := {value:#x} was refused with #GP")
        self._must_not_inject(entry)

    def send_ipi(self, vcpu_id: int, vector: int) -> Path:
        """Interrupt another CPU of this guest."""
        self.acc.add(VC_IPIS)
        self.acc.event(Kind.IPI, 0, vcpu_id, vector)
        entry = yield from self.exit(ExitReason.IPI, arg0=vcpu_id, arg1=vector)
        self._must_not_inject(entry)

    def access32(self, gpa: int, *, write: bool = False, value: int = 0) -> Path:
        """A restartable access of kernel code to guest memory; returns the word. Nested faults are taken until it succeeds."""
        while True:
            ask = self.new_ask()
            self.emit(Access32(ask.ask_id, gpa, write, value))
            got = yield ask
            if got.ok:
                return got.value
            self.acc.add(VC_NESTED)
            self.acc.add(VC_KERNEL_NESTED)
            entry = yield from self.exit(ExitReason.NESTED, fault=self._fault())
            self._must_not_inject(entry)

    def clear_page(self, gpa: int) -> Path:
        """Fill a page of guest memory with zeros, as restartable as `access32`."""
        while True:
            ask = self.new_ask()
            self.emit(ClearPage(ask.ask_id, gpa))
            got = yield ask
            if got.ok:
                return
            self.acc.add(VC_NESTED)
            self.acc.add(VC_KERNEL_NESTED)
            entry = yield from self.exit(ExitReason.NESTED, fault=self._fault())
            self._must_not_inject(entry)

    def _fault(self) -> tuple[int, int, int]:
        load = self.page.load
        return load(VP_X_GPA), load(VP_X_GVA), load(VP_X_FLAGS)

    # ---- time ---------------------------------------------------------------------------------------------------------------
    def spend(self, ns: int) -> None:
        """Guest time that passes on this CPU while it runs."""
        if not ns:
            return
        self.vclock_ns += ns
        self.acc.set(VC_VCLOCK_NS, self.vclock_ns)
        self.acc.add(VC_RUNNING_NS, ns)
        self.queue.charge(ns)

    def _held(self, kind: int, ns: int) -> None:
        """Guest time that passed in the host. The guest cannot tell, so the current task pays."""
        counter = _HELD_COUNTER.get(kind)
        if counter is None:
            return
        self.vclock_ns += ns
        self.acc.set(VC_VCLOCK_NS, self.vclock_ns)
        self.acc.add(counter, ns)
        self.queue.charge(ns)

    # ---- small things ---------------------------------------------------------------------------------------------------------
    def relax(self) -> Ask:
        """Let others run; yield what this returns."""
        return self._relax()

    def _relax(self) -> Ask:
        ask = self.new_ask()
        self.emit(Relax(ask.ask_id))
        return ask

    def task_load(self, task: int, field: int) -> int:
        """A word of a task record."""
        return self.kernel.load(self._base + task * TASK_WORDS + field)

    def task_store(self, task: int, field: int, value: int) -> None:
        """Set a word of a task record."""
        self.kernel.store(self._base + task * TASK_WORDS + field, value)

    def task_move(self, task: int, event: str) -> None:
        """Take a task of this CPU along an arrow of proto/lives.py TASK. Raises MachineError."""
        at = self._base + task * TASK_WORDS + T_STATE
        self.kernel.store(at, TASK.go(self.kernel.load(at), event))

    def task_try(self, task: int, event: str) -> bool:
        """The same where another CPU may change the state: False when the task is not at the arrow's beginning. A full barrier."""
        source, target = TASK.arrow(event)
        return self.task_cmpxchg(task, T_STATE, source, target) == source

    def task_cmpxchg(self, task: int, field: int, expected: int, value: int) -> int:
        """Compare and exchange a word of a task record; a full barrier."""
        return self.kernel.cmpxchg(self._base + task * TASK_WORDS + field, expected, value)
