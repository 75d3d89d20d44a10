"""A guest of several CPUs with real tasks on the host's real machines, in one process: who goes next is drawn from a seed.

Guest mode is `vcpu_run` on the same arrays that the host's machines work on, so pages are swapped, words are checked, and what is lost
is seen. There are no processes and no messages. A CPU may be parked at the named steps of the guest kernel while the others go on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from guest.accounting import Accounting
from guest.boot import TaskSpec, init_kernel, shadow_words
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
from guest.mmu import OK, flush, make_vcpu
from guest.run import kernel_access32, kernel_clear_page, vcpu_run
from host import events as ev
from proto import layout as L  # noqa: N812 - a table of constants
from proto.events import Kind
from proto.lives import Where
from proto.profile import PROFILES
from proto.stats import BLOCK_WORDS, StatsBlock
from proto.wire import Inject
from tests.guest.cpu_world import Log
from tests.host.harness import WORDS, Bench

MODES = {"mainline": "interrupt", "v7": "exception", "v3": "exception"}
NS_PER_OP = 100
STEPS_MAX = 400_000


class _Host(Bench):
    """The bench, whose vCPUs enter and leave guest mode by themselves."""

    at_barrier = 0

    def _perform(self, effect: Any) -> None:
        kind = type(effect)
        if kind is ev.Enter:
            assert effect.cpu not in self.entries, "entered twice"
            self.entries[effect.cpu] = effect.record
        elif kind is ev.KickVcpu:
            self.kicks.append(effect.cpu)
            self.vcpu_pages[effect.cpu * WORDS + L.VP_DOORBELL] = 1
        elif kind is ev.AtBarrier:
            self.at_barrier = max(self.at_barrier, effect.tasks)
        else:
            super()._perform(effect)


class WholeMachine:
    """``tasks``: what runs. ``frames``: host memory; guest memory is ``pages``. ``rest``: whether a CPU is parked at a step."""

    def __init__(
        self,
        tasks: Sequence[TaskSpec],
        *,
        vcpus: int = 2,
        profile: str = "mainline",
        seed: int = 1,
        pages: int = 512,
        frames: int = 96,
        spare: int = 0,
        rest: Callable[[int, str], bool] | None = None,
    ) -> None:
        self.random = random.Random(seed)
        self.host = _Host(
            profile=profile,
            vcpus=vcpus,
            pages=pages,
            frames=frames,
            spare=spare,
            slots=2 * pages,
            low=16,
            high=32,
        )
        self.tasks = tuple(tasks)
        self.vcpus = vcpus
        self.pages = pages
        self.kern = np.zeros(L.kernel_words(len(tasks), vcpus, pages), np.uint64)
        self.control = np.zeros(512, np.uint64)
        self.shadow = np.zeros(max(1, shadow_words(self.tasks)), np.uint32)
        self._load()
        self.log = Log()
        self.cpu: list[GuestCpu] = []
        self.arrays = []
        self.pokes: list[Callable[[], None]] = []
        for number in range(vcpus):
            config = CpuConfig(
                vm=0, vcpu_id=number, vcpus=vcpus, tasks=len(tasks), mode=MODES[profile], profile=PROFILES[profile],
                send_always=False, preemptible=False, tick_ns=100_000, granularity_ns=200_000, exit_cost_ns=0,
                exception_cost_ns=0, switch_cost_ns=0, interrupt_cost_ns=0, hotplug=True,
            )  # fmt: skip
            page = self.host.vcpu_pages[number * WORDS : (number + 1) * WORDS]
            m = make_vcpu(
                self.host.memory.frames, self.host.memory.vms[0].npt, self.kern, self.control, self.host.vmc, page,
                self.shadow, np.zeros(1, np.uint32), np.zeros(1, np.uint64),
            )  # fmt: skip
            acc = Accounting(page, StatsBlock(np.zeros(BLOCK_WORDS, np.uint64)), self.log, 0, number)
            cpu = GuestCpu(config, self.kern, page, self.control, acc, vmc=self.host.vmc)
            if rest is not None:
                cpu.park_with(lambda step, number=number, rest=rest: rest(number, step))  # type: ignore[misc]
            self.arrays.append(m)
            self.cpu.append(cpu)
        self.request: list[Any] = [None] * vcpus
        self.off: set[int] = set()
        self.steps = 0

    def _load(self) -> None:
        init_kernel(self.kern, self.tasks, self.vcpus, self.pages, 1)
        self.shadow[:] = 0

    # -- driving -----------------------------------------------------------------------------------------------
    def run(self, until: Callable[[], bool] | None = None, steps: int = STEPS_MAX) -> None:
        """Until every CPU has powered down, or ``until`` holds; AssertionError when neither comes."""
        if not self.steps:
            for cpu in range(self.vcpus):
                self._feed(cpu, PowerOn())
        for _ in range(steps):
            if until is not None and until():
                return
            if len(self.off) == self.vcpus:
                assert until is None, "the machine is off"
                return
            self.step()
        raise AssertionError(f"no end: {[type(r).__name__ for r in self.request]}")

    def step(self) -> None:
        """One request of one CPU, or something in the host."""
        self.steps += 1
        self.host.now += 1_000
        draw = self.random.random()
        if draw < 0.05 and self.host.io:
            self.host.complete(self.host.io.pop(self.random.randrange(len(self.host.io))))
        elif draw < 0.1:
            self.host.feed(self.host.vm, ev.LookAtGrace())
        elif draw < 0.12 and self.host.timers:
            timer = self.host.timers.pop(0)
            self.host.feed(self.host.vcpus[timer.cpu], ev.TimerDue(timer.cpu, timer.generation))
        else:
            self._step_cpu(self.random.randrange(self.vcpus))
        if self.host.at_barrier >= len(self.tasks) and not self.control[L.CTL_BARRIER]:
            self.control[L.CTL_BARRIER] = 1
            self.poke()

    def poke(self) -> None:
        """Something changed in the control words."""
        for vcpu in self.host.vcpus:
            if vcpu.where is not Where.OFF:
                self.host.feed(vcpu, ev.Poke(vcpu.cpu))

    def want(self, *, offline: Sequence[int] = (), reboots: int | None = None) -> None:
        """What the run wants: exactly these CPUs offline, so many reboots in all."""
        self.host.vmc[L.VMC_OFFLINE] = sum(1 << cpu for cpu in offline)
        if reboots is not None:
            self.host.vmc[L.VMC_REBOOTS] = reboots
        self.poke()

    def stop(self) -> None:
        """The measured time is over."""
        self.control[L.CTL_STOP] = 1
        self.poke()

    def _feed(self, cpu: int, event: Any) -> None:
        self._take(cpu, self.cpu[cpu].on([event], self.host.now))

    def _take(self, cpu: int, effects: list[Any]) -> None:
        self.request[cpu] = effects[0] if effects else None
        if isinstance(self.request[cpu], TakeExit):
            self.host.entries.pop(cpu, None)
            self.host.vcpu_pages[cpu * WORDS + L.VP_DOORBELL] = 0
            self.host.feed(self.host.vcpus[cpu], ev.ExitTaken(self.request[cpu].record))

    def _step_cpu(self, cpu: int) -> None:
        request = self.request[cpu]
        if request is None:
            if self.cpu[cpu].parked:
                self._take(cpu, self.cpu[cpu].resume(0, self.host.now))
        elif isinstance(request, TakeExit):
            entry = self.host.entries.pop(cpu, None)
            if entry is not None:
                if entry.inject == Inject.RESET:
                    flush(self.arrays[cpu])
                self._feed(cpu, Entered(request.ask, entry))
        elif isinstance(request, PowerDown):
            if cpu not in self.off:
                self.off.add(cpu)
                assert request.record is not None
                self.host.feed(self.host.vcpus[cpu], ev.ExitTaken(request.record))
        else:
            self._feed(cpu, self._guest_mode(cpu, request))

    def _guest_mode(self, cpu: int, request: Any) -> Any:
        m = self.arrays[cpu]
        if isinstance(request, RunTask):
            code = vcpu_run(m, request.task, request.max_ops or 1 + self.random.randrange(200))
            return Ran(request.ask, code, int(m.vp[L.VP_X_OPS]) * NS_PER_OP)
        if isinstance(request, Access32):
            status, value = kernel_access32(m, request.gpa, request.write, request.value)
            return Accessed(request.ask, status == OK, int(value))
        if isinstance(request, ClearPage):
            status, _ = kernel_access32(m, request.gpa, True, 0)
            return Accessed(request.ask, status == OK and kernel_clear_page(m, request.gpa), 0)
        if isinstance(request, LoadKernel):
            self._load()
        else:
            assert isinstance(request, Relax)
        return Relaxed(request.ask)

    # -- questions ---------------------------------------------------------------------------------------------
    def word(self, task: int, field: int) -> int:
        """A word of a task record."""
        return int(self.kern[L.task_base(len(self.tasks), self.vcpus) + task * L.TASK_WORDS + field])

    def online(self) -> set[int]:
        """CPUs that the guest says are online."""
        return {cpu for cpu in range(self.vcpus) if int(self.kern[L.K_ONLINE]) >> cpu & 1}

    def total(self, counter: int) -> int:
        """A VC_* counter over all CPUs."""
        return sum(int(self.host.vcpu_pages[c * WORDS + L.VP_COUNTERS + counter]) for c in range(self.vcpus))

    def barrier_open(self) -> bool:
        """Tasks are past the start barrier."""
        return bool(self.control[L.CTL_BARRIER])

    def announced(self) -> int:
        """Pages announced to the guest."""
        return self.log.count(Kind.G_NP)


def stamps(count: int, vcpus: int, *, ops: int = 0, pages: int = 60) -> list[TaskSpec]:
    """Tasks that check every word they read, until the stop flag (``ops`` = 0) or for so many operations."""
    return [TaskSpec(L.P_STAMP, cpu=n % vcpus, space=n, pages=pages, ops=ops, index=n) for n in range(count)]
