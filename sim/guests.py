"""The guests of a simulated run: the guest kernel's machine of every vCPU on real page tables, run by the compiled run loop.

What guest/shell.py does with a process is done here in virtual time. A stay in guest mode executes its operations at once and takes their
guest time; until the vCPU leaves to the host it counts as in guest mode. It may look at the flush generation late (`Chance.lags`), as a
real one looks only every so many operations: until then it goes on with old translations, and no grace period may end.

Invariants: entering guest mode sees the newest generation (Dekker's rule of guest/run.py); messages to a vCPU keep their order; a kick that
finds it on its way out is swallowed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from guest.accounting import Accounting
from guest.boot import TaskSpec, init_kernel, plan_tasks, shadow_words
from guest.events import (
    Access32,
    Accessed,
    ClearPage,
    CpuConfig,
    Entered,
    LoadKernel,
    PowerDown,
    PowerOn,
    Ran,
    Relax,
    Relaxed,
    RunTask,
    TakeExit,
)
from guest.machine import GuestCpu
from guest.mmu import OK, U64, flush, make_vcpu
from guest.run import kernel_access32, kernel_clear_page, vcpu_run
from host.memory import HostMemory
from proto.layout import (
    K_FREE,
    K_OWNERS,
    K_TASKS,
    MODE_IN_GUEST,
    MODE_OUTSIDE,
    T_KILL_REASON,
    T_STATE,
    TASK_WORDS,
    TS_KILLED,
    VC_INTEGRITY_ERRORS,
    VC_READS_CHECKED,
    VMC_FLUSH_GEN,
    VP_COUNTERS,
    VP_COUNTERS_LEN,
    VP_DOORBELL,
    VP_STATE,
    VP_TASK,
    VP_X_GPA,
    VP_X_OPS,
    kernel_words,
    task_base,
)
from proto.profile import PROFILES
from proto.run import PROC_VCPU
from proto.stats import BLOCK_WORDS, StatsBlock
from proto.topology_keys import Task, Vm
from proto.units import WORDS_PER_PAGE
from proto.wire import Entry, Exit, Inject
from sim.agenda import Agenda
from sim.chance import Chance
from sim.log import EventLog, GuestSink
from sim.plan import SimPlan, VmPlan

KIB_PER_PAGE: Final = 4
ACCESS_NS: Final = 50
RELAX_NS: Final = 2_000
TICK_NS: Final = 100_000
GRANULARITY_NS: Final = 300_000
EXIT_NS: Final = 500
COST_NS: Final = 300
"""Guest time of an exit, and of an exception, a switch or an interrupt."""

TakesExit = Callable[[int, Exit], None]


def task_specs(plan: VmPlan) -> list[TaskSpec]:
    """Tasks as the guest's boot wants them, by the rules of every run (guest/boot.py)."""
    tables = tuple(
        Task(
            workload=task.workload, memory_kib=task.pages * KIB_PER_PAGE, write_percent=task.write_percent, ops=task.ops, vcpu=task.vcpu,
            fault_threads=task.fault_threads, work_threads=task.work_threads,
        )
        for task in plan.tasks
    )  # fmt: skip
    return plan_tasks(Vm(vcpus=plan.vcpus, task=tables)).tasks


class GuestVm:
    """What the vCPUs of one guest share."""

    __slots__ = ("_seed", "_specs", "kernel", "plan", "shadow")

    def __init__(self, plan: VmPlan, seed: int) -> None:
        self.plan = plan
        self._seed = seed
        self._specs = task_specs(plan)
        self.kernel: U64 = np.zeros(kernel_words(len(self._specs), plan.vcpus, plan.memory_pages), np.uint64)
        self.shadow = np.zeros(max(1, shadow_words(self._specs)), np.uint32)
        self.load()

    def load(self) -> None:
        """The kernel's memory and the shadow as they are at power-on."""
        init_kernel(self.kernel, self._specs, self.plan.vcpus, self.plan.memory_pages, self._seed)
        self.shadow[:] = 0

    def killed_by(self, reason: int) -> int:
        """How many tasks were killed for one reason (KILL_*)."""
        base = task_base(self.tasks, self.plan.vcpus)
        records = self.kernel[base : base + self.tasks * TASK_WORDS].reshape(self.tasks, TASK_WORDS)
        return int(((records[:, T_STATE] == TS_KILLED) & (records[:, T_KILL_REASON] == reason)).sum())

    def free_pages(self) -> list[int]:
        """Pages on the allocator's stack. ValueError when it goes round in a circle."""
        owners, found = int(self.kernel[K_OWNERS]), []
        gfn = int(self.kernel[K_FREE]) & 0xFFFF_FFFF
        while gfn:
            found.append(gfn)
            if len(found) > self.plan.memory_pages:
                raise ValueError("the stack of free pages has a circle")
            gfn = int(self.kernel[owners + gfn]) & 0xFFFF_FFFF
        return found

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        return int(self.kernel[K_TASKS])


class _Cpu:
    """One vCPU and where it is."""

    __slots__ = (
        "arrays",
        "ask",
        "entry_ns",
        "generation",
        "machine",
        "newest",
        "op_ns",
        "outside",
        "page",
        "parked",
    )

    def __init__(self, machine: GuestCpu, arrays: Any, newest: Any, page: Any, op_ns: int) -> None:
        self.machine = machine
        self.op_ns = op_ns
        self.arrays = arrays
        self.generation = arrays.vmc.data
        """The flush generation as this vCPU sees it."""
        self.newest = newest
        self.page = page
        self.outside = True
        self.ask = 0
        """The exit that waits for its entry."""
        self.entry_ns = 0
        """When the last message to it arrives."""
        self.parked: list[int] = []
        """Serial numbers of its parked paths, in the machine's order."""


class Guests:
    """All vCPUs of a plan. ``exit_taken``: called when an exit record reaches the host. ``actors``: of the vCPUs in the agenda.

    ``before``: the vCPUs that stood at their save points; these ones go on for them.
    """

    def __init__(
        self, plan: SimPlan, memory: HostMemory, control: U64, log: EventLog, agenda: Agenda, chance: Chance,
        actors: Sequence[int], exit_taken: TakesExit, before: Guests | None = None,
    ) -> None:  # fmt: skip
        self.vms: list[GuestVm] = (
            before.vms if before else [GuestVm(vm, plan.seed + v) for v, vm in enumerate(plan.vms)]
        )
        self._agenda = agenda
        self._chance = chance
        self._actors = actors
        self._exit_taken = exit_taken
        self._serial = 0
        self.cpus = [
            self._make_cpu(plan, memory, control, log, cpu, vm, vcpu_id, before)
            for cpu, (vm, vcpu_id) in enumerate(plan.cpus)
        ]
        self._perform: dict[type[Any], Callable[[int, _Cpu, Any], None]] = {
            RunTask: self._run_task, TakeExit: self._take_exit, Access32: self._access, Relax: self._relax,
            PowerDown: self._power_down, ClearPage: self._clear_page, LoadKernel: self._load_kernel,
        }  # fmt: skip

    def _make_cpu(
        self, plan: SimPlan, memory: HostMemory, control: U64, log: EventLog, cpu: int, vm: int, vcpu_id: int, before: Guests | None
    ) -> _Cpu:  # fmt: skip
        guest = self.vms[vm]
        config = CpuConfig(
            vm=vm, vcpu_id=vcpu_id, vcpus=guest.plan.vcpus, tasks=guest.tasks, mode=plan.mode, profile=PROFILES[plan.profile],
            send_always=guest.plan.send_always, preemptible=guest.plan.preemptible, tick_ns=TICK_NS, granularity_ns=GRANULARITY_NS,
            exit_cost_ns=EXIT_NS, exception_cost_ns=COST_NS, switch_cost_ns=COST_NS, interrupt_cost_ns=COST_NS,
        )  # fmt: skip
        page = memory.vcpus[cpu * WORDS_PER_PAGE : (cpu + 1) * WORDS_PER_PAGE]
        arrays = make_vcpu(
            memory.frames, memory.vms[vm].npt, guest.kernel, control, np.zeros(WORDS_PER_PAGE, np.uint64), page, guest.shadow,
            np.zeros(1, np.uint32), np.zeros(1, np.uint64),
        )  # fmt: skip
        stats = StatsBlock(np.zeros(BLOCK_WORDS, np.uint64))
        acc = Accounting(page, stats, GuestSink(log, PROC_VCPU + cpu), vm, vcpu_id)
        resume = None
        if before is not None:
            old = before.cpus[cpu]
            resume = old.machine.registers(self._agenda.now_ns)
            # Registers and counters that lie in the page; state word and doorbell begin anew.
            for first, end in ((VP_TASK, VP_X_GPA), (VP_COUNTERS, VP_COUNTERS + VP_COUNTERS_LEN)):
                page[first:end] = old.page[first:end]
        machine = GuestCpu(config, guest.kernel, page, control, acc, resume, memory.vms[vm].vmc)
        made = _Cpu(machine, arrays, memory.vms[vm].vmc.data, page.data, guest.plan.op_ns)
        machine.park_with(lambda step: self._parks(cpu, made, step))
        return made

    def power_on(self) -> None:
        """All vCPUs start."""
        for cpu, one in enumerate(self.cpus):
            self._tell(cpu, one, PowerOn())

    # -- running -------------------------------------------------------------------------------------------
    def _tell(self, cpu: int, one: _Cpu, event: Any) -> None:
        self._do(cpu, one, one.machine.on((event,), self._agenda.now_ns))

    def _do(self, cpu: int, one: _Cpu, requests: list[Any]) -> None:
        for request in requests:
            self._perform[type(request)](cpu, one, request)

    def _later(self, cpu: int, one: _Cpu, ns: int, answer: Any) -> None:
        self._agenda.after(ns, self._actors[cpu], lambda: self._tell(cpu, one, answer))

    def _look_at_generation(self, one: _Cpu) -> None:
        """Before guest code runs: surely after an entry, perhaps during a stay."""
        if one.generation[VMC_FLUSH_GEN] != one.newest[VMC_FLUSH_GEN] and (
            one.outside or not self._chance.lags()
        ):
            one.generation[VMC_FLUSH_GEN] = one.newest[VMC_FLUSH_GEN]
        one.outside = False

    def _stay(self, one: _Cpu) -> None:
        """Guest code goes on after this: to the host the vCPU is in guest mode, with the translations it has."""
        one.page[VP_STATE] = one.generation[VMC_FLUSH_GEN] << 2 | MODE_IN_GUEST

    def _run_task(self, cpu: int, one: _Cpu, request: RunTask) -> None:
        budget = self._chance.budget()
        if request.max_ops:
            budget = min(budget, request.max_ops)
        if request.max_ns:
            budget = max(1, min(budget, -(-request.max_ns // one.op_ns)))
        self._look_at_generation(one)
        code = vcpu_run(one.arrays, request.task, budget)
        ns = one.page[VP_X_OPS] * one.op_ns
        self._stay(one)
        self._later(cpu, one, ns + 1, Ran(request.ask, code, ns))

    def _access(self, cpu: int, one: _Cpu, request: Access32) -> None:
        self._look_at_generation(one)
        status, value = kernel_access32(one.arrays, request.gpa, request.write, request.value)
        self._stay(one)
        self._later(cpu, one, ACCESS_NS, Accessed(request.ask, status == OK, int(value)))

    def _clear_page(self, cpu: int, one: _Cpu, request: ClearPage) -> None:
        self._look_at_generation(one)
        status, _ = kernel_access32(one.arrays, request.gpa, True, 0)
        done = status == OK and kernel_clear_page(one.arrays, request.gpa)
        self._stay(one)
        self._later(cpu, one, ACCESS_NS, Accessed(request.ask, done, 0))

    def _load_kernel(self, cpu: int, one: _Cpu, request: LoadKernel) -> None:
        self.vms[one.machine.config.vm].load()
        self._later(cpu, one, ACCESS_NS, Relaxed(request.ask))

    def _relax(self, cpu: int, one: _Cpu, request: Relax) -> None:
        self._agenda.demote(self._actors[cpu])
        self._later(cpu, one, RELAX_NS, Relaxed(request.ask))

    # -- exits and entries ---------------------------------------------------------------------------------
    def _leave(self, cpu: int, one: _Cpu, record: Exit) -> None:
        one.outside = True
        one.page[VP_STATE] = one.generation[VMC_FLUSH_GEN] << 2 | MODE_OUTSIDE
        one.page[VP_DOORBELL] = 0
        self._agenda.after(self._chance.local_ns(), self._actors[cpu], lambda: self._exit_taken(cpu, record))

    def _take_exit(self, cpu: int, one: _Cpu, request: TakeExit) -> None:
        one.ask = request.ask
        self._leave(cpu, one, request.record)

    def _power_down(self, cpu: int, one: _Cpu, request: PowerDown) -> None:
        if request.record is not None:
            self._leave(cpu, one, request.record)

    def enter(self, cpu: int, entry: Entry) -> None:
        """The host sends the entry record."""
        one = self.cpus[cpu]
        ask = one.ask
        if entry.inject == Inject.RESET:
            flush(one.arrays)
        self._send(cpu, one, lambda: self._tell(cpu, one, Entered(ask, entry)))

    def kick(self, cpu: int) -> None:
        """The host wants this vCPU out of guest mode."""
        one = self.cpus[cpu]
        self._send(cpu, one, lambda: self._kicked(one))

    def _kicked(self, one: _Cpu) -> None:
        if not one.outside:
            one.page[VP_DOORBELL] = 1

    def _send(self, cpu: int, one: _Cpu, action: Callable[[], None]) -> None:
        """Messages to a vCPU keep their order."""
        one.entry_ns = max(one.entry_ns, self._agenda.now_ns + self._chance.local_ns())
        self._agenda.at(one.entry_ns, self._actors[cpu], action)

    # -- parked paths --------------------------------------------------------------------------------------
    def _parks(self, cpu: int, one: _Cpu, step: str) -> bool:
        ns = self._chance.park_ns(step)
        if ns:
            self._serial += 1
            serial = self._serial
            one.parked.append(serial)
            self._agenda.after(ns, self._actors[cpu], lambda: self._resume(cpu, one, serial))
        return ns > 0

    def _resume(self, cpu: int, one: _Cpu, serial: int) -> None:
        index = one.parked.index(serial)
        del one.parked[index]
        self._do(cpu, one, one.machine.resume(index, self._agenda.now_ns))

    # -- questions -----------------------------------------------------------------------------------------
    def counter(self, offset: int) -> int:
        """Sum of a counter (VC_*) over all vCPUs."""
        return sum(int(one.page[VP_COUNTERS + offset]) for one in self.cpus)

    @property
    def integrity_errors(self) -> int:
        """Words that did not hold what was written there."""
        return self.counter(VC_INTEGRITY_ERRORS)

    @property
    def reads_checked(self) -> int:
        """Words that were compared with what was written there."""
        return self.counter(VC_READS_CHECKED)
