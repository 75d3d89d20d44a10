"""The guest kernel of one CPU as a pure machine: what this CPU does next, from its boot to its end.

A CPU is sequential, so the machine is one path with one open request at a time (guest/events.py): run a task in guest mode, leave to the
host, access guest memory, let others run. Its world performs the request and feeds the answer back. Real processes and a simulated
world drive the same machine.

This file is the CPU's life: boot, main loop, reset, save points, power-down. What happens on the way is in the CPU's parts, each with a
state of its own; a part reaches the others through the CPU.

    execution   a stay of the current task in guest mode, halts, exceptions, the end of a task   guest/execution.py
    switching   who runs next                             guest/switching.py, queue: guest/sched.py
    interrupts  pending, taken, sent                      guest/interrupts.py
    exits       to the host and back                      guest/exits.py
    access      guest memory as kernel code touches it    guest/kernel_access.py
    apf         async page faults                         guest/apf.py, sleepers: guest/sleepers.py
    oom         memory is short in the host               guest/oom.py
    hotplug     CPUs that go and come, reboots            guest/hotplug.py
    phases      start barrier, stop                       guest/phases.py
    tasks       task records                              guest/task_records.py
    clock       guest time                                guest/clock.py

Invariants
* Between two rounds of the main loop no kernel code is under way: interrupts are taken, tasks switched and requests of the run looked at
  there (in a wait(token) that halts, interrupts only).
* What survives a reset is the emulator's: the clock, the accounts, the numbering of exits.

Not handled here: performing requests (guest/shell.py).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from guest.accounting import Accounting
from guest.apf import AsyncPf
from guest.clock import Clock
from guest.events import CpuConfig, PowerDown, PowerOn, Relax
from guest.execution import Execution
from guest.exits import CpuReset, Exits
from guest.hotplug import Hotplug
from guest.interrupts import Interrupts
from guest.kernel_access import KernelAccess
from guest.oom import OutOfMemory
from guest.phases import Phases
from guest.registers import Registers
from guest.sched import RunQueue
from guest.sleepers import Sleepers
from guest.switching import Switching
from guest.task_records import TaskRecords
from proto.kvm import MSR_X2APIC_SPIV, SPIV_ENABLE
from proto.layout import (
    K_MEMORY_PAGES,
    K_ONLINE,
    T_FAULT_NS,
    VP_APF_ENABLED,
    VP_CR0_PG,
    VP_CR3,
    VP_IRQ_PENDING,
    VP_NEED_RESCHED,
    VP_TASK,
    owners_base,
)
from proto.machine import Ask, Machine, Path
from proto.port import ArrayPort, MemoryPort
from proto.units import WORDS_PER_PAGE
from proto.wire import ExitReason

SPURIOUS: Final = 0xFF
"""Low byte of SPIV."""
_REGISTERS: Final = (VP_TASK, VP_CR0_PG, VP_CR3, VP_APF_ENABLED, VP_IRQ_PENDING, VP_NEED_RESCHED)
"""Words of the vCPU page that a reset clears."""


class GuestCpu(Machine):
    """One vCPU's kernel.

    ``kernel``: the guest kernel segment, ``vcpu_page``: this CPU's page, ``control``: page 0 of the control segment (read only),
    ``vmc``: the page of this VM in it (read only; without one nobody ever asks this guest for a reboot or a CPU). Events: `PowerOn`
    once, then answers. Effects: exactly one request, the last one `PowerDown`. ``resume``: go on from a save point.
    """

    __slots__ = (
        "_resume",
        "acc",
        "access",
        "apf",
        "clock",
        "config",
        "execution",
        "exits",
        "hotplug",
        "interrupts",
        "kernel",
        "oom",
        "owners",
        "owners_at",
        "page",
        "phases",
        "queue",
        "sleepers",
        "switching",
        "tasks",
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
        self.owners_at = owners_base(config.tasks, config.vcpus)
        self.owners = kernel[self.owners_at : self.owners_at + int(kernel[K_MEMORY_PAGES])]
        """The owner of each guest page (K_OWNERS)."""
        self.tasks = TaskRecords(self.kernel, kernel, config.tasks, config.vcpus)
        self.queue = RunQueue(
            kernel, config.tasks, config.vcpus, config.vcpu_id, config.tick_ns, config.granularity_ns
        )
        self.clock = Clock(acc, self.queue)
        self.exits = Exits(self)
        self.interrupts = Interrupts(self)
        self.access = KernelAccess(self)
        self.switching = Switching(self)
        self.execution = Execution(self)
        self.phases = Phases(self, ArrayPort(control))
        self.sleepers = Sleepers(self.kernel, config.tasks, config.vcpus, config.vcpu_id, acc, self.relax)
        self.apf = AsyncPf(self)
        self.oom = OutOfMemory(self)
        self.hotplug = Hotplug(
            self, ArrayPort(vmc if vmc is not None else np.zeros(WORDS_PER_PAGE, np.uint64))
        )
        self._resume = resume
        if resume is not None:
            self._set_registers(resume)

    @property
    def vclock_ns(self) -> int:
        """Guest time of this CPU."""
        return self.clock.vclock_ns

    @property
    def barrier_open(self) -> bool:
        """Whether this CPU has seen the start barrier open."""
        return self.phases.barrier_open

    def path_for(self, event: Any) -> Path | None:
        """`PowerOn` starts the CPU, everything else answers its open request."""
        if type(event) is PowerOn:
            return self._main()
        self.answer(event.ask, event)
        return None

    def relax(self) -> Ask:
        """Let others run; yield what this returns."""
        ask = self.new_ask()
        self.emit(Relax(ask.ask_id))
        return ask

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
        queue, interrupts = self.queue, self.interrupts
        while True:
            self.phases.look()
            if interrupts.irr and interrupts.on() and interrupts.due():
                yield from interrupts.take()
                # Handlers leave to the host; a poke that came meanwhile is used up, so look again before anything that may sleep.
                continue
            if self.config.hotplug and (yield from self.hotplug.look()):
                continue
            if self.clock.vclock_ns >= queue.next_tick_ns and interrupts.on():
                queue.tick(self.clock.vclock_ns)
            if queue.current < 0 or queue.need_resched:
                self.switching.schedule()
            if queue.current >= 0:
                if not (yield from self.execution.run_current()):
                    self._power_down(abort=True)
                    return
            elif queue.alive or not self.hotplug.may_power_down():
                yield from self.execution.halt()
            else:
                self._power_down(abort=False)
                return

    def _boot(self) -> Path:
        """Interrupts are off until the main loop (T1: the enable register is written before this CPU's first interrupt)."""
        yield from self.exits.take(ExitReason.BOOT)
        yield from self.exits.take_undisturbed(ExitReason.CR0, arg0=1)
        self.page.store(VP_CR0_PG, 1)
        yield from self.exits.wrmsr(MSR_X2APIC_SPIV, SPIV_ENABLE | SPURIOUS)
        if self.config.enables_async_pf:
            yield from self.apf.enable()
            # A kernel boots on with interrupts on for long before its first task runs: the broadcast of enabling comes here. Later it
            # would wake a task whose ready event is still to come, and that one would then leave a dummy for nobody.
            entry = yield from self.exits.take(ExitReason.HYPERCALL, if_=1)
            yield from self.execution.deliver(entry)
        # Each CPU sets its own bit, when it is clear, so adding is setting.
        self.kernel.add(K_ONLINE + self.config.vcpu_id // 64, 1 << (self.config.vcpu_id % 64))
        self.acc.interrupts = 1

    def _forget(self) -> None:
        """What a reset leaves: the clock and the accounts, which are the emulator's."""
        for word in _REGISTERS:
            self.page.store(word, 0)
        self.queue.forget()
        self.oom.forget()
        self.interrupts.forget()
        self.apf.forget()
        self.switching.idle()
        self.acc.interrupts = 0

    def _power_down(self, *, abort: bool) -> None:
        self.phases.note_end()
        self.emit(PowerDown(None if abort else self.exits.record(ExitReason.DONE)))

    # ---- saved and restored -------------------------------------------------------------------------------------------------
    def registers(self, now_ns: int) -> Registers:
        """All that this CPU holds at a save point; ``now_ns`` monotonic."""
        return Registers(
            off=0,
            vclock_ns=self.clock.vclock_ns,
            seq=self.exits.seq,
            halting=self.apf.halting,
            strays=self.apf.strays,
            last=self.switching.last,
            lamport=self.acc.trace.lamport,
            at_ns=now_ns,
            **self.phases.registers(),
            **self.queue.registers(),
        )

    def _set_registers(self, resume: Registers) -> None:
        self.clock.vclock_ns = resume.vclock_ns
        self.exits.seq = resume.seq
        self.apf.halting = bool(resume.halting)
        self.apf.strays = resume.strays
        self.switching.last = resume.last
        self.phases.set_registers(resume)
        self.queue.set_registers(resume)
        self.acc.trace.observe(resume.lamport)

    def _go_on(self, saved_ns: int) -> Path:
        """A fresh CPU takes up what a saved one left: in a task, in the halt loop of one, or idle."""
        self.phases.skip_since(saved_ns)
        task = self.queue.current
        self.acc.interrupts = 1
        if task < 0 or self.apf.halting:
            entry = yield from self.exits.take(ExitReason.RESUME, if_=1, restart=True)
        else:
            self.tasks.store(task, T_FAULT_NS, self.now_ns)
            entry = yield from self.execution.exit_from_task(ExitReason.RESUME, task)
        # No other interrupt may wait for the guest clock: the broadcast has to come before any new fault.
        self.interrupts.gate_ns = 0
        yield from self.execution.deliver(entry)
        if self.apf.halting:
            self.acc.interrupts = 0
            yield from self.apf.go_on_halting(task)
            self.acc.interrupts = 1
